package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/imps-node/imps/pkg/sync/cluster"
)

func TestParseResources(t *testing.T) {
	t.Parallel()
	const good = `apiVersion: images.banzaicloud.io/v1alpha1
kind: ImagePullSecret
metadata:
  name: team-a
spec:
  target:
    secret: {name: pull}
    namespaces: {labels: [{}]}
  registry:
    credentials: [{name: hub, namespace: registry-access}]
`
	second := strings.Replace(good, "team-a", "team-b", 1)
	asJSON := `{"apiVersion":"images.banzaicloud.io/v1alpha1","kind":"ImagePullSecret","metadata":{"name":"team-c"}}`
	tests := map[string]struct {
		file string
		want []string
		err  string
	}{
		"one document":         {file: good, want: []string{"team-a"}},
		"several documents":    {file: "# a comment\n---\n" + good + "---\n\n---\n" + second + "---\n", want: []string{"team-a", "team-b"}},
		"JSON":                 {file: asJSON, want: []string{"team-c"}},
		"a list as of kubectl": {file: `{"apiVersion":"v1","kind":"List","items":[` + asJSON + `]}`, want: []string{"team-c"}},
		"a typed list": {
			file: `{"apiVersion":"images.banzaicloud.io/v1alpha1","kind":"ImagePullSecretList","metadata":{},"items":[` + asJSON + `]}`,
			want: []string{"team-c"},
		},
		"as read from a cluster": {
			file: good + "status: {status: Ready, validitySeconds: 3, managedNamespaces: [a]}\n", want: []string{"team-a"},
		},
		"nothing":             {file: "# nothing\n", err: "there is no ImagePullSecret"},
		"an unknown field":    {file: good + "---\n" + strings.Replace(second, "labels:", "label:", 1), err: `document 2: unknown field "spec.target.namespaces.label"`},
		"a field twice":       {file: good + "spec: {}\n", err: `document 1: yaml: unmarshal errors:` + "\n" + `  line 11: key "spec" already set in map`},
		"another kind":        {file: "apiVersion: v1\nkind: Secret\n", err: `document 1: it has apiVersion "v1" and kind "Secret", and only images.banzaicloud.io/v1alpha1 ImagePullSecret can be planned`},
		"another version":     {file: strings.Replace(good, "v1alpha1", "v1", 1), err: `document 1: it has apiVersion "images.banzaicloud.io/v1" and kind "ImagePullSecret"`},
		"no kind":             {file: "metadata: {name: a}\n", err: `document 1: it has apiVersion "" and kind ""`},
		"no name":             {file: strings.Replace(good, "name: team-a", "generateName: team-", 1), err: `document 1: metadata.name "" is not a valid name`},
		"one name twice":      {file: good + "---\n" + good, err: "document 2: ImagePullSecret team-a is there twice"},
		"no object":           {file: "just text", err: "document 1: it is no object"},
		"no YAML":             {file: "a: [", err: "document 1: yaml: line 1:"},
		"a wrong type":        {file: strings.Replace(good, "{name: pull}", "[pull]", 1), err: "document 1: "},
		"a list of no object": {file: `{"kind":"List","items":["a"]}`, err: "document 1: it is no object"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			resources, err := parseResources(strings.NewReader(test.file))
			if test.err != "" {
				require.ErrorContains(t, err, test.err)
				return
			}
			require.NoError(t, err)
			var names []string
			for _, r := range resources {
				names = append(names, r.Name)
			}
			require.Equal(t, test.want, names)
		})
	}
}

func TestPlanOutput(t *testing.T) {
	t.Parallel()
	plans := []cluster.PlanResult{
		{
			Name: "team-a", Exists: true, Target: "pull",
			Namespaces: []cluster.PlannedNamespace{
				{Name: "a", SelectedBy: []string{"name", "pods"}, Outcome: cluster.PlanCreate},
				{Name: "longer-name", SelectedBy: []string{"label"}, Outcome: cluster.PlanForeign},
			},
			Registries: []cluster.PlannedRegistry{
				{Registry: "docker.io", Source: "registry-access.hub", Overrides: []string{"registry-access.old"}},
				{Registry: "ghcr.io", Source: "registry-access.hub"},
			},
			Conflicts: []cluster.PlanConflict{
				{Kind: cluster.ConflictForeign, Namespace: "longer-name", Message: "somebody else's"},
				{Kind: cluster.ConflictSource, Message: "source registry-access.gone: not found"},
			},
			Notes:   []string{"namespace later does not exist"},
			Unknown: []string{"cannot list Pods: forbidden"},
		},
		{Name: "team-b"},
	}
	var table bytes.Buffer
	require.NoError(t, writePlanTables(&table, plans))
	require.Equal(t, `ImagePullSecret team-a (exists), Secret pull: 2 namespaces, 2 registries, 2 conflicts

NAMESPACE     SELECTED BY   OUTCOME
a             name,pods     create
longer-name   label         foreign

REGISTRY    SOURCE                OVERRIDES
docker.io   registry-access.hub   registry-access.old
ghcr.io     registry-access.hub   -

CONFLICT        NAMESPACE     WHAT
ForeignSecret   longer-name   somebody else's
SourceFailed    -             source registry-access.gone: not found

UNKNOWN
cannot list Pods: forbidden

NOTE
namespace later does not exist

ImagePullSecret team-b (new), Secret -: 0 namespaces, 0 registries, 0 conflicts
`, table.String())

	var text bytes.Buffer
	require.NoError(t, writeJSON(&text, plans))
	var decoded []cluster.PlanResult
	require.NoError(t, json.Unmarshal(text.Bytes(), &decoded))
	require.Equal(t, plans, decoded)
}
