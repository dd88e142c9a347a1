package sync

import (
	"context"
	"fmt"
	"net/http"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"
)

// Secrets reads and writes target Secrets. It asks for metadata only, so that no answer
// of the server ever holds data of a Secret.
type Secrets struct {
	metadata metadata.Interface
	rest     rest.Interface
}

// NewSecrets returns a client with the given configuration and connection.
func NewSecrets(config *rest.Config, connection *http.Client) (*Secrets, error) {
	m, err := metadata.NewForConfigAndClient(config, connection)
	if err != nil {
		return nil, fmt.Errorf("metadata client: %w", err)
	}
	config = metadata.ConfigFor(config)
	config.GroupVersion = &corev1.SchemeGroupVersion
	config.APIPath = "/api"
	r, err := rest.RESTClientForConfigAndClient(config, connection)
	if err != nil {
		return nil, fmt.Errorf("REST client: %w", err)
	}
	return &Secrets{metadata: m, rest: r}, nil
}

// Get returns the metadata of a Secret.
func (s *Secrets) Get(ctx context.Context, namespace, name string) (*metav1.PartialObjectMetadata, error) {
	return s.metadata.Resource(SecretResource).Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
}

// Create applies a target where nothing is. Where the server says that something was
// there after all, created is false, and the caller judges it anew; a foreign Secret is
// then as it was before.
func (s *Secrets) Create(ctx context.Context, namespace string, target Target) (m *metav1.PartialObjectMetadata, created bool, err error) {
	m, status, err := s.apply(ctx, namespace, target.Name(), target.Body(""), false)
	if err != nil {
		return nil, false, err
	}
	if status == http.StatusCreated {
		return m, true, nil
	}
	if !coOwned(m) {
		return m, false, nil
	}
	// A Secret with the very same data came in between: the apply was no conflict, and
	// has put our label and owner reference on somebody else's Secret. An apply of
	// nothing gives up what is ours alone.
	for {
		body := fmt.Sprintf(`{"apiVersion":"v1","kind":"Secret","metadata":{"name":%q,"resourceVersion":%q}}`, target.Name(), m.ResourceVersion)
		released, _, err := s.apply(ctx, namespace, target.Name(), []byte(body), false)
		if err == nil {
			return released, false, nil
		}
		if apierrors.IsConflict(err) {
			m, err = s.Get(ctx, namespace, target.Name())
		}
		if err != nil {
			return nil, false, fmt.Errorf("take our marks off a foreign Secret: %w", err)
		}
	}
}

// coOwned reports whether another manager than ours owns the data.
func coOwned(m *metav1.PartialObjectMetadata) bool {
	data := fieldpath.MakePathOrDie("data", corev1.DockerConfigJsonKey)
	for i := range m.ManagedFields {
		entry := &m.ManagedFields[i]
		if isOurEntry(entry) || entry.FieldsV1 == nil {
			continue
		}
		set := &fieldpath.Set{}
		if set.FromJSON(entry.FieldsV1.GetRawReader()) == nil && set.Has(data) {
			return true
		}
	}
	return false
}

// Update applies a target over the Secret at this resourceVersion; at another one, or
// where there is none, the server answers with a conflict.
func (s *Secrets) Update(ctx context.Context, namespace string, target Target, resourceVersion string) (*metav1.PartialObjectMetadata, error) {
	m, _, err := s.apply(ctx, namespace, target.Name(), target.Body(resourceVersion), true)
	return m, err
}

// Adopt makes a Legacy or Restored Secret ours; see AdoptionPatch.
func (s *Secrets) Adopt(ctx context.Context, m *metav1.PartialObjectMetadata) (*metav1.PartialObjectMetadata, error) {
	patch, err := AdoptionPatch(m)
	if err != nil {
		return nil, err
	}
	return s.metadata.Resource(SecretResource).Namespace(m.Namespace).
		Patch(ctx, m.Name, types.JSONPatchType, patch, metav1.PatchOptions{FieldManager: FieldManager})
}

// Delete deletes exactly the Secret with this UID at this resourceVersion.
func (s *Secrets) Delete(ctx context.Context, namespace, name string, uid types.UID, resourceVersion string) error {
	return s.metadata.Resource(SecretResource).Namespace(namespace).Delete(ctx, name, metav1.DeleteOptions{
		Preconditions: &metav1.Preconditions{UID: &uid, ResourceVersion: &resourceVersion},
	})
}

// ListWatch lists and watches the Secrets of one name in all namespaces, which is what
// RBAC can allow by name.
func (s *Secrets) ListWatch(name string) cache.ListerWatcher {
	return MetadataListWatch(s.metadata, SecretResource, fields.OneTermEqualSelector(metav1.ObjectNameField, name).String())
}

func (s *Secrets) apply(ctx context.Context, namespace, name string, body []byte, force bool) (*metav1.PartialObjectMetadata, int, error) {
	var status int
	result := s.rest.Patch(types.ApplyPatchType).
		Namespace(namespace).Resource(SecretResource.Resource).Name(name).
		Param("fieldManager", FieldManager).
		Param("force", fmt.Sprint(force)).
		SetHeader("Accept", "application/vnd.kubernetes.protobuf;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1").
		Body(body).Do(ctx).StatusCode(&status)
	object, err := result.Get()
	if err != nil {
		return nil, status, err
	}
	m, ok := object.(*metav1.PartialObjectMetadata)
	if !ok {
		return nil, status, apierrors.NewInternalError(fmt.Errorf("the API server answered an apply with %T, not with metadata", object))
	}
	return m, status, nil
}
