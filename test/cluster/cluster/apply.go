package cluster

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/restmapper"
	"sigs.k8s.io/yaml"
)

// fieldManager is the owner of the fields that Apply sets, as if Helm had
// installed the objects.
const fieldManager = "helm"

// establishTimeout bounds the wait for a new resource to be served.
const establishTimeout = 30 * time.Second

var (
	customResources = schema.GroupVersionResource{
		Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions",
	}
	errNotServed = errors.New("resource is not served yet")
)

// Apply puts the objects of a YAML stream into the cluster by server-side apply
// with field manager "helm", for instance the output of `helm template`. The
// CustomResourceDefinitions go first, and Apply waits until they are served;
// then the Namespaces; then the rest in the order of the stream. Lists are taken
// apart. A namespaced object without a namespace goes to "default". Hooks are
// applied like anything else.
//
// It stops at the first object that is refused, also where another field
// manager owns a field that the object sets differently.
func (c *Cluster) Apply(ctx context.Context, manifests []byte) error {
	objects, err := parseManifests(manifests)
	if err != nil {
		return err
	}
	client, err := dynamic.NewForConfig(c.admin)
	if err != nil {
		return fmt.Errorf("create a client: %w", err)
	}
	disco, err := discovery.NewDiscoveryClientForConfig(c.admin)
	if err != nil {
		return fmt.Errorf("create a discovery client: %w", err)
	}
	a := applier{client: client, mapper: restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(disco))}

	slices.SortStableFunc(objects, func(x, y *unstructured.Unstructured) int { return rank(x) - rank(y) })
	for _, object := range objects {
		if err := a.apply(ctx, object); err != nil {
			return fmt.Errorf("apply %s %s: %w", object.GetKind(), object.GetName(), err)
		}
		if rank(object) == 0 {
			if err := a.awaitServed(ctx, object); err != nil {
				return fmt.Errorf("wait until %s is served: %w", object.GetName(), err)
			}
		}
	}
	return nil
}

// rank says how early an object has to be applied.
func rank(object *unstructured.Unstructured) int {
	switch object.GroupVersionKind().GroupKind() {
	case schema.GroupKind{Group: customResources.Group, Kind: "CustomResourceDefinition"}:
		return 0
	case schema.GroupKind{Kind: "Namespace"}:
		return 1
	default:
		return 2
	}
}

type applier struct {
	client dynamic.Interface
	mapper *restmapper.DeferredDiscoveryRESTMapper
}

func (a *applier) apply(ctx context.Context, object *unstructured.Unstructured) error {
	kind := object.GroupVersionKind()
	// The mapper asks the server again by itself when it does not know a kind.
	mapping, err := a.mapper.RESTMapping(kind.GroupKind(), kind.Version)
	if err != nil {
		return err
	}
	var client dynamic.ResourceInterface = a.client.Resource(mapping.Resource)
	if mapping.Scope.Name() == meta.RESTScopeNameNamespace {
		namespace := object.GetNamespace()
		if namespace == "" {
			namespace = metav1.NamespaceDefault
		}
		client = a.client.Resource(mapping.Resource).Namespace(namespace)
	}
	_, err = client.Apply(ctx, object.GetName(), object, metav1.ApplyOptions{FieldManager: fieldManager})
	return err
}

// awaitServed waits until a CustomResourceDefinition is Established and each of
// its served versions is in discovery and answers a list: the three follow one
// another within moments, and an object applied in between is not found.
func (a *applier) awaitServed(ctx context.Context, crd *unstructured.Unstructured) error {
	var last error
	err := wait.PollUntilContextTimeout(ctx, pollInterval, establishTimeout, true, func(ctx context.Context) (bool, error) {
		last = a.served(ctx, crd.GetName())
		return last == nil, nil
	})
	if err != nil {
		return fmt.Errorf("%w: %w", err, last)
	}
	return nil
}

func (a *applier) served(ctx context.Context, name string) error {
	crd, err := a.client.Resource(customResources).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if !established(crd) {
		return fmt.Errorf("%w: not established", errNotServed)
	}
	group, _, _ := unstructured.NestedString(crd.Object, "spec", "group")
	kind, _, _ := unstructured.NestedString(crd.Object, "spec", "names", "kind")
	versions, _, _ := unstructured.NestedSlice(crd.Object, "spec", "versions")
	for _, entry := range versions {
		version, _ := entry.(map[string]any)
		if version["served"] != true {
			continue
		}
		versionName, _ := version["name"].(string)
		mapping, err := a.mapper.RESTMapping(schema.GroupKind{Group: group, Kind: kind}, versionName)
		if err != nil {
			a.mapper.Reset()
			return err
		}
		if _, err := a.client.Resource(mapping.Resource).List(ctx, metav1.ListOptions{Limit: 1}); err != nil {
			return err
		}
	}
	return nil
}

func established(crd *unstructured.Unstructured) bool {
	conditions, _, _ := unstructured.NestedSlice(crd.Object, "status", "conditions")
	return slices.ContainsFunc(conditions, func(entry any) bool {
		condition, _ := entry.(map[string]any)
		return condition["type"] == "Established" && condition["status"] == "True"
	})
}

// parseManifests splits a YAML stream into objects; empty documents and those
// of comments only are skipped.
func parseManifests(manifests []byte) ([]*unstructured.Unstructured, error) {
	var objects []*unstructured.Unstructured
	reader := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(manifests)))
	for {
		document, err := reader.Read()
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		if err != nil {
			return nil, fmt.Errorf("split the manifests: %w", err)
		}
		object := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(document, &object.Object); err != nil {
			return nil, fmt.Errorf("parse manifest %d: %w", len(objects)+1, err)
		}
		if len(object.Object) == 0 {
			continue
		}
		if object.GetAPIVersion() == "" || object.GetKind() == "" {
			return nil, fmt.Errorf("parse manifest %d: it has no apiVersion or no kind", len(objects)+1)
		}
		if !object.IsList() {
			objects = append(objects, object)
			continue
		}
		list, err := object.ToList()
		if err != nil {
			return nil, fmt.Errorf("take list apart: %w", err)
		}
		for i := range list.Items {
			objects = append(objects, &list.Items[i])
		}
	}
}
