package integration

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// spec is a spec with this target, indented by two, and the source "hub".
func spec(target string) string {
	return "target:\n  secret: {name: " + secretName + "}\n" + target + "\nregistry: {credentials: [{name: hub, namespace: " + sourceNamespace + "}]}\n"
}

// K1: whatever banzaicloud/imps stored is accepted unchanged.
func TestEveryResourceThatIMPSAcceptedIsAccepted(t *testing.T) {
	s := newSystem(t)
	for name, body := range map[string]string{
		"no spec":                   `{}`,
		"no selectors":              `spec: {target: {secret: {name: x}}, registry: {credentials: []}}`,
		"empty target name":         `spec: {target: {secret: {name: ""}}, registry: {credentials: []}}`,
		"empty selector entries":    `spec: {target: {secret: {name: x}, namespaces: {labels: [{}], annotations: [{}]}, namespacesWithPods: {labels: [{}], annotations: [{}]}}, registry: {credentials: []}}`,
		"empty lists":               `spec: {target: {secret: {name: x}, namespaces: {names: [], labels: [], annotations: []}, namespacesWithPods: {labels: []}}, registry: {credentials: []}}`,
		"an operator nobody knows":  `spec: {target: {secret: {name: x}, namespaces: {labels: [{matchExpressions: [{key: a, operator: Foo}]}], annotations: [{matchExpressions: [{key: a, operator: Foo}]}]}}, registry: {credentials: []}}`,
		"empty values":              `spec: {target: {secret: {name: x}, namespaces: {labels: [{matchExpressions: [{key: ignore-imps, operator: DoesNotExist, values: []}]}]}}, registry: {credentials: []}}`,
		"labels and annotations":    `spec: {target: {secret: {name: x, labels: {a: b}, annotations: {c: d e}}}, registry: {credentials: [{name: a, namespace: b}]}}`,
		"empty name of a source":    `spec: {target: {secret: {name: x}}, registry: {credentials: [{name: "", namespace: ""}]}}`,
		"a duplicate source":        `spec: {target: {secret: {name: x}}, registry: {credentials: [{name: a, namespace: b}, {name: a, namespace: b}]}}`,
		"a URL in matchAnnotations": `spec: {target: {secret: {name: x}, namespaces: {annotations: [{matchAnnotations: {a: "https://x/y z"}}]}}, registry: {credentials: []}}`,
	} {
		t.Run(name, func(t *testing.T) {
			object := &unstructured.Unstructured{}
			require.NoError(t, yaml.Unmarshal([]byte(body), &object.Object))
			object.SetAPIVersion("images.banzaicloud.io/v1alpha1")
			object.SetKind("ImagePullSecret")
			object.SetGenerateName(s.prefix + "-")
			created, err := s.dynamic.Resource(v1alpha1.Resource).Create(t.Context(), object, metav1.CreateOptions{})
			require.NoError(t, err)
			want, _, _ := unstructured.NestedMap(object.Object, "spec")
			have, _, _ := unstructured.NestedMap(created.Object, "spec")
			require.Equal(t, want, have, "the server stores it as it was given")
		})
	}
	for name, body := range map[string]string{
		"both forms in one entry":          `spec: {target: {secret: {name: x}}, registry: {credentials: [{name: a, namespace: b, ecr: {registries: [c]}}]}}`,
		"neither form in one entry":        `spec: {target: {secret: {name: x}}, registry: {credentials: [{}]}}`,
		"a source without its namespace":   `spec: {target: {secret: {name: x}}, registry: {credentials: [{name: a}]}}`,
		"a kubelet scope nobody knows":     `spec: {target: {secret: {name: x}, kubelet: {scope: Cluster}}, registry: {credentials: []}}`,
		"credentials that are null":        `spec: {target: {secret: {name: x}}, registry: {credentials: null}}`,
		"namespacesWithPods as an array":   `spec: {target: {secret: {name: x}, namespacesWithPods: []}, registry: {credentials: []}}`,
		"an inline ECR without registries": `spec: {target: {secret: {name: x}}, registry: {credentials: [{ecr: {registries: []}}]}}`,
	} {
		t.Run("refused: "+name, func(t *testing.T) {
			object := &unstructured.Unstructured{}
			require.NoError(t, yaml.Unmarshal([]byte(body), &object.Object))
			object.SetAPIVersion("images.banzaicloud.io/v1alpha1")
			object.SetKind("ImagePullSecret")
			object.SetGenerateName(s.prefix + "-")
			_, err := s.dynamic.Resource(v1alpha1.Resource).Create(t.Context(), object, metav1.CreateOptions{})
			require.Error(t, err)
		})
	}
}

// K1, second half: the coordinator takes odd resources calmly, and serves what can be served.
func TestOddResourcesAreTakenCalmly(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.resource(s.prefix+"-nospec", "")
	s.ready(s.prefix+"-nospec", 0)
	s.resource(s.prefix+"-none", spec(""))
	s.ready(s.prefix+"-none", 0)
	s.resource(s.prefix+"-unnamed", `{target: {secret: {name: ""}, namespaces: {names: [x]}}, registry: {credentials: []}}`)
	s.failed(s.prefix+"-unnamed", "spec.target.secret.name is empty")
	s.resource(s.prefix+"-operator", spec(`  namespaces: {labels: [{matchExpressions: [{key: a, operator: Foo}]}]}`))
	s.failed(s.prefix+"-operator", "Foo", "spec.target.namespaces.labels[0]")
	s.resource(s.prefix+"-name", `{target: {secret: {name: elsewhere}, namespaces: {names: [x]}}, registry: {credentials: []}}`)
	s.failed(s.prefix+"-name", "--target-secret-names", "targetSecretNames")
	s.resource(s.prefix+"-empty", `{target: {secret: {name: `+secretName+`}}, registry: {credentials: []}}`)
	s.ready(s.prefix+"-empty", 0)

	namespace := s.namespace(map[string]string{s.prefix: "yes"}, nil)
	s.resource(s.prefix+"-pods", spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: "yes"}}]}
  namespacesWithPods: {labels: [{matchExpressions: [{key: a, operator: Foo}]}]}`))
	s.has(namespace, "registry.one")
	s.failed(s.prefix+"-pods", "Foo", "spec.target.namespacesWithPods.labels[0]", "the others are served")
}

func TestNewFieldsThatDoNothingYetSaySo(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	namespace := s.namespace(nil, nil)
	s.resource(s.prefix, `
target:
  secret: {name: `+secretName+`}
  namespaces: {names: [`+namespace+`]}
  serviceAccounts: {names: [default]}
  rescue: true
  kubelet: {}
registry:
  credentials:
  - {name: hub, namespace: registry-access}
  - ecr: {registries: [123456789012.dkr.ecr.eu-central-1.amazonaws.com]}
`)
	s.has(namespace, "registry.one")
	status := s.becomes(s.prefix, func(status v1alpha1.ImagePullSecretStatus) error {
		reasons := map[string]string{}
		for _, c := range status.Conditions {
			reasons[c.Type] = fmt.Sprintf("%s %s", c.Status, c.Reason)
		}
		if !maps.Equal(reasons, map[string]string{
			"Ready": "False SourceFailed", "SourcesReady": "False SourceFailed", "SecretsReady": "True Ready",
			"ServiceAccountsReady": "False NotAllowed", "KubeletReady": "True Ready",
		}) {
			return fmt.Errorf("conditions are %v", reasons)
		}
		return nil
	})
	require.Equal(t, "Ok", status.SourceSecretStatus["registry-access.hub"])
	require.Contains(t, status.SourceSecretStatus["ecr.123456789012.dkr.ecr.eu-central-1.amazonaws.com"], "not supported")
}

// K2, K3, K4, K6, K7 and B24: exactly the selected namespaces have the Secret.
func TestExactlyTheSelectedNamespacesHaveTheSecret(t *testing.T) {
	const url = "https://a.example/path with space"
	for name, c := range map[string]struct {
		target string // NAME, KEY are replaced
		yes    map[string][2]map[string]string
		no     map[string][2]map[string]string
	}{
		"any of several kinds is enough": {
			target: `  namespaces: {labels: [{matchLabels: {KEY: a}}, {matchLabels: {KEY: b}}], annotations: [{matchAnnotations: {KEY: "` + url + `"}}]}`,
			yes: map[string][2]map[string]string{
				"first label":  {{"KEY": "a"}, nil},
				"second label": {{"KEY": "b"}, nil},
				"annotation":   {nil, {"KEY": url}},
			},
			no: map[string][2]map[string]string{"other label": {{"KEY": "c"}, nil}, "other annotation": {nil, {"KEY": "a"}}},
		},
		"inside one entry everything must match": {
			target: `  namespaces: {labels: [{matchLabels: {KEY: a}, matchExpressions: [{key: KEY-2, operator: In, values: [x, "y"]}]}]}`,
			yes:    map[string][2]map[string]string{"both": {{"KEY": "a", "KEY-2": "y"}, nil}},
			no:     map[string][2]map[string]string{"one": {{"KEY": "a"}, nil}, "the other": {{"KEY-2": "x"}, nil}},
		},
		"DoesNotExist matches what lacks the key": {
			target: `  namespaces: {labels: [{matchLabels: {KEY: a}, matchExpressions: [{key: ignore-imps, operator: DoesNotExist, values: []}]}]}`,
			yes:    map[string][2]map[string]string{"lacks it": {{"KEY": "a"}, nil}},
			no:     map[string][2]map[string]string{"has it": {{"KEY": "a", "ignore-imps": ""}, nil}},
		},
		"NotIn matches what lacks the key": {
			target: `  namespaces: {annotations: [{matchAnnotations: {KEY: a}, matchExpressions: [{key: other, operator: NotIn, values: [x]}]}]}`,
			yes:    map[string][2]map[string]string{"lacks it": {nil, {"KEY": "a"}}, "another value": {nil, {"KEY": "a", "other": "y"}}},
			no:     map[string][2]map[string]string{"that value": {nil, {"KEY": "a", "other": "x"}}},
		},
		"an empty entry matches everything": {
			target: `  namespaces: {labels: [{}]}`,
			yes:    map[string][2]map[string]string{"any": {nil, nil}, "another": {{"KEY": "a"}, nil}},
		},
		"empty lists match nothing": {
			target: `  namespaces: {names: [], labels: [], annotations: []}`,
			no:     map[string][2]map[string]string{"any": {nil, nil}, "another": {{"KEY": "a"}, nil}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSystem(t)
			s.source("hub", dockerConfig("registry.one"))
			replace := func(m map[string]string) map[string]string {
				out := map[string]string{}
				for k, v := range m {
					out[replaceKey(k, s.prefix)] = v
				}
				return out
			}
			create := func(pair [2]map[string]string) string { return s.namespace(replace(pair[0]), replace(pair[1])) }
			var yes, no []string
			// Half of them are there before the resource, half come after it.
			ordered := slices.Sorted(maps.Keys(c.yes))
			for i, what := range ordered {
				if i%2 == 1 {
					yes = append(yes, create(c.yes[what]))
				}
			}
			s.coordinator()
			s.resource(s.prefix, spec(replaceKey(c.target, s.prefix)))
			for _, pair := range c.no {
				no = append(no, create(pair))
			}
			for i, what := range ordered {
				if i%2 == 0 {
					yes = append(yes, create(c.yes[what]))
				}
			}
			for _, namespace := range yes {
				s.has(namespace, "registry.one")
			}
			s.becomes(s.prefix, func(status v1alpha1.ImagePullSecretStatus) error {
				if status.Status != v1alpha1.StatusReady {
					return fmt.Errorf("not Ready")
				}
				return nil
			})
			for _, namespace := range no {
				require.Nil(t, s.secret(namespace, secretName))
			}
		})
	}
}

func TestANamedNamespaceIsServedOnceItIsThere(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.resource(s.prefix, spec(`  namespaces: {names: [`+s.prefix+`-later]}`))
	s.ready(s.prefix, 0)
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.prefix + "-later"}}
	_, err := s.core.CoreV1().Namespaces().Create(t.Context(), namespace, metav1.CreateOptions{})
	require.NoError(t, err)
	s.has(namespace.Name, "registry.one")
	s.ready(s.prefix, 1)
	require.NoError(t, s.core.CoreV1().Namespaces().Delete(t.Context(), namespace.Name, metav1.DeleteOptions{}))
	s.ready(s.prefix, 0)
}

// K8, K9: what a target Secret looks like.
func TestATargetSecretIsWhatIMPSWrote(t *testing.T) {
	s := newSystem(t)
	s.source("one", []byte(`{"auths":{"registry.one":{"auth":"`+base64Of(canaryUser+":"+canaryPassword)+`"}}}`))
	s.source("two", dockerConfig("registry.two"))
	s.coordinator()
	namespace := s.namespace(nil, nil)
	r := s.resource(s.prefix, `
target:
  secret:
    name: `+secretName+`
    labels: {team: a, images.banzaicloud.io/owner-uid: mine}
    annotations: {note: b, images.banzaicloud.io/revision: mine, banzaicloud.com/last-applied: mine}
  namespaces: {names: [`+namespace+`]}
registry:
  credentials: [{name: one, namespace: registry-access}, {name: two, namespace: registry-access}]
`)
	secret := s.has(namespace, "registry.one", "registry.two")
	require.Equal(t, corev1.SecretTypeDockerConfigJson, secret.Type)
	require.Len(t, secret.Data, 1)
	require.Equal(t, map[string]string{"team": "a", impsync.LabelOwnerUID: string(r.UID)}, secret.Labels)
	require.Equal(t, map[string]string{"note": "b", impsync.AnnotationRevision: string(r.UID) + ".1"}, secret.Annotations)
	require.Equal(t, []metav1.OwnerReference{{APIVersion: "images.banzaicloud.io/v1alpha1", Kind: "ImagePullSecret", Name: r.Name, UID: r.UID}}, secret.OwnerReferences)
	entry := `{"username":"` + canaryUser + `","password":"` + canaryPassword + `","auth":"` + base64Of(canaryUser+":"+canaryPassword) + `"}`
	require.JSONEq(t, `{"auths":{"registry.one":`+entry+`,"registry.two":`+entry+`}}`, string(secret.Data[corev1.DockerConfigJsonKey]))

	// A label that the resource no longer asks for goes (B17); one of a user stays.
	s.change(s.prefix, `spec: {target: {secret: {labels: {team: null, other: c}}}}`)
	s.eventually(func() error {
		if labels := s.secret(namespace, secretName).Labels; labels["other"] != "c" || labels["team"] != "" {
			return fmt.Errorf("labels are %v", labels)
		}
		return nil
	}, "the labels do not follow the resource")
}

// B6: of two sources for one registry the last listed wins, always.
func TestTheLastListedSourceWinsARegistry(t *testing.T) {
	s := newSystem(t)
	s.source("one", dockerConfig("registry.one", "https://index.docker.io/v1/"))
	s.source("two", []byte(`{"auths":{"registry.one":{"username":"second","password":"`+canaryPassword+`"},"docker.io":{"username":"second","password":"`+canaryPassword+`"}}}`))
	s.coordinator()
	namespace := s.namespace(nil, nil)
	s.resource(s.prefix, `
target: {secret: {name: `+secretName+`}, namespaces: {names: [`+namespace+`]}}
registry:
  credentials: [{name: one, namespace: registry-access}, {name: two, namespace: registry-access}]
`)
	secret := s.has(namespace, "registry.one", "docker.io")
	require.Contains(t, string(secret.Data[corev1.DockerConfigJsonKey]), `"username":"second"`)
	require.NotContains(t, string(secret.Data[corev1.DockerConfigJsonKey]), canaryUser)
}
