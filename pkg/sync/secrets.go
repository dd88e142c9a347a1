package sync

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// Secrets reads and writes target Secrets, each call within CallTimeout. It asks for metadata
// only, and decodes nothing else: no data of a Secret is ever held.
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
	return s.get(ctx, namespace, name, metav1.GetOptions{})
}

// Absent is a resourceVersion that no object has. An apply at it creates where nothing is,
// and is a conflict where anything is. Without it an apply would make us a co-owner of a
// foreign Secret with the same data, and one that comes late would bring old content back.
const Absent = "1"

// Create applies a target where nothing is; where something is, the server answers with a
// conflict.
func (s *Secrets) Create(ctx context.Context, namespace string, target Target) (*metav1.PartialObjectMetadata, error) {
	return s.apply(ctx, namespace, target.Name(), target.Body("", Absent), false)
}

// Update applies a target over a Secret as it was read. If there is another one by now, or
// another state of it, or none, the server answers with a conflict.
func (s *Secrets) Update(ctx context.Context, namespace string, target Target, existing Existing) (*metav1.PartialObjectMetadata, error) {
	return s.apply(ctx, namespace, target.Name(), target.Body(existing.UID, existing.ResourceVersion), true)
}

// Adopt makes a Legacy or Restored Secret ours; see AdoptionPatch.
func (s *Secrets) Adopt(ctx context.Context, m *metav1.PartialObjectMetadata) (*metav1.PartialObjectMetadata, error) {
	patch, err := AdoptionPatch(m)
	if err != nil {
		return nil, err
	}
	return send(ctx, s.patch(types.JSONPatchType, m.Namespace, m.Name).Body(patch))
}

// Delete deletes exactly the Secret with this UID at this resourceVersion.
func (s *Secrets) Delete(ctx context.Context, namespace, name string, uid types.UID, resourceVersion string) error {
	options, err := json.Marshal(metav1.DeleteOptions{
		TypeMeta:      metav1.TypeMeta{APIVersion: "v1", Kind: "DeleteOptions"},
		Preconditions: &metav1.Preconditions{UID: &uid, ResourceVersion: &resourceVersion},
	})
	if err != nil {
		return fmt.Errorf("encode the preconditions of a delete: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	return s.rest.Delete().Namespace(namespace).Resource(SecretResource.Resource).Name(name).
		SetHeader("Content-Type", runtime.ContentTypeJSON).MaxRetries(0).Body(options).Do(ctx).Error()
}

// Peek returns the metadata of a Secret as it was a moment ago: from the API server's
// memory, where Get asks etcd.
func (s *Secrets) Peek(ctx context.Context, namespace, name string) (*metav1.PartialObjectMetadata, error) {
	return s.get(ctx, namespace, name, metav1.GetOptions{ResourceVersion: "0"})
}

func (s *Secrets) get(ctx context.Context, namespace, name string, options metav1.GetOptions) (*metav1.PartialObjectMetadata, error) {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	return s.metadata.Resource(SecretResource).Namespace(namespace).Get(ctx, name, options)
}

// ListWatch lists and watches the Secrets of one name in all namespaces, which is what
// RBAC can allow by name.
func (s *Secrets) ListWatch(name string) cache.ListerWatcher {
	return MetadataListWatch(s.metadata, SecretResource, fields.OneTermEqualSelector(metav1.ObjectNameField, name).String())
}

func (s *Secrets) apply(ctx context.Context, namespace, name string, body []byte, force bool) (*metav1.PartialObjectMetadata, error) {
	return send(ctx, s.patch(types.ApplyPatchType, namespace, name).Param("force", fmt.Sprint(force)).Body(body))
}

// patch begins a patch of a Secret. Like every write here it is tried once: client-go would
// heed a Retry-After within the time that one call may take, and forget it after that. The
// queues keep it.
func (s *Secrets) patch(patchType types.PatchType, namespace, name string) *rest.Request {
	return s.rest.Patch(patchType).Namespace(namespace).Resource(SecretResource.Resource).Name(name).
		Param("fieldManager", FieldManager).
		SetHeader("Accept", "application/vnd.kubernetes.protobuf;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1").
		MaxRetries(0)
}

func send(ctx context.Context, request *rest.Request) (*metav1.PartialObjectMetadata, error) {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	object, err := request.Do(ctx).Get()
	if err != nil {
		return nil, err
	}
	m, ok := object.(*metav1.PartialObjectMetadata)
	if !ok {
		return nil, apierrors.NewInternalError(fmt.Errorf("the API server answered a patch with %T, not with metadata", object))
	}
	return m, nil
}
