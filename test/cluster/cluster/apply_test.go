package cluster

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
)

// manifests has everything in the wrong order: a custom resource before its
// definition, an object before its namespace.
const manifests = `# a comment only
---
apiVersion: test.imps.example/v1
kind: Widget
metadata: {name: first, namespace: PREFIX}
spec: {size: 3}
---
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: ConfigMap
  metadata: {name: one, namespace: PREFIX}
  data: {key: value}
- apiVersion: v1
  kind: ConfigMap
  metadata: {name: PREFIX}
---
apiVersion: v1
kind: Namespace
metadata: {name: PREFIX}
---
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: widgets.PREFIX.imps.example}
spec:
  group: PREFIX.imps.example
  scope: Namespaced
  names: {kind: Widget, listKind: WidgetList, plural: widgets, singular: widget}
  versions:
  - name: v1
    served: true
    storage: true
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec: {type: object, properties: {size: {type: integer}}}
---
`

func TestApply(t *testing.T) {
	t.Run("a stream with a definition and its resource goes in, twice", func(t *testing.T) {
		prefix := Prefix(t)
		stream := strings.NewReplacer("PREFIX", prefix, "test.imps", prefix+".imps").Replace(manifests)
		for range 2 {
			require.NoError(t, shared.Apply(t.Context(), []byte(stream)))
		}

		client := shared.Client()
		one, err := client.CoreV1().ConfigMaps(prefix).Get(t.Context(), "one", metav1.GetOptions{})
		require.NoError(t, err)
		require.Equal(t, map[string]string{"key": "value"}, one.Data)
		require.Equal(t, "helm", one.ManagedFields[0].Manager)
		require.Equal(t, metav1.ManagedFieldsOperationApply, one.ManagedFields[0].Operation)
		_, err = client.CoreV1().ConfigMaps("default").Get(t.Context(), prefix, metav1.GetOptions{})
		require.NoError(t, err)

		widgets, err := dynamic.NewForConfig(shared.Admin())
		require.NoError(t, err)
		_, err = widgets.Resource(schema.GroupVersionResource{Group: prefix + ".imps.example", Version: "v1", Resource: "widgets"}).
			Namespace(prefix).Get(t.Context(), "first", metav1.GetOptions{})
		require.NoError(t, err)
	})

	t.Run("a field of another manager is left alone", func(t *testing.T) {
		namespace := shared.Namespace(t, nil)
		object := configMap("taken")
		object.Data = map[string]string{"key": "theirs"}
		_, err := shared.Client().CoreV1().ConfigMaps(namespace).Create(t.Context(), object, metav1.CreateOptions{})
		require.NoError(t, err)
		err = shared.Apply(t.Context(), []byte(
			"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: taken, namespace: "+namespace+"}\ndata: {key: ours}\n"))
		require.ErrorContains(t, err, "apply ConfigMap taken")
		require.ErrorContains(t, err, "conflict")
	})

	for name, stream := range map[string]string{
		"what is no YAML is refused":       "a: b: c",
		"what has no kind is refused":      "apiVersion: v1\nmetadata: {name: x}",
		"what the server lacks is refused": "apiVersion: imps.example/v1\nkind: Nothing\nmetadata: {name: x}",
		"what has a bad name is refused":   "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: Not_Valid}",
	} {
		t.Run(name, func(t *testing.T) {
			require.Error(t, shared.Apply(t.Context(), []byte(stream)))
		})
	}
}
