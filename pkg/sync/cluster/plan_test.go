package cluster

import (
	"encoding/base64"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// plannedResource returns a resource with a spec given as YAML.
func plannedResource(t *testing.T, name, spec string) *v1alpha1.ImagePullSecret {
	t.Helper()
	r := &v1alpha1.ImagePullSecret{ObjectMeta: metav1.ObjectMeta{Name: name}}
	require.NoError(t, yaml.UnmarshalStrict([]byte(spec), &r.Spec))
	return r
}

func newTestPlanner(r *v1alpha1.ImagePullSecret) *planner {
	return &planner{resource: r, Coordinator: &Coordinator{config: Config{
		TargetSecretNames: []string{"pull", "pull-b"}, SourceNamespaces: []string{"registry-access"}, Excluded: impsync.Exclusion{"kube-*"},
	}}}
}

func TestPlanOfNamespaces(t *testing.T) {
	t.Parallel()
	const (
		own   = types.UID("uid-own")
		older = types.UID("uid-older")
	)
	now := time.Now().Truncate(time.Second)
	ref := func(name string, uid types.UID, age time.Duration) impsync.ResourceRef {
		return impsync.ResourceRef{Name: name, UID: uid, CreationTimestamp: metav1.NewTime(now.Add(-age))}
	}
	ours := func(uid types.UID) impsync.Existing {
		return impsync.Existing{Ownership: impsync.Ours, OwnerUID: uid}
	}
	labelled := namespaceMeta{labels: map[string]string{"team": "a"}}
	tests := map[string]struct {
		spec string
		// namespaces is nil where there is one, "a", with the label team=a.
		namespaces map[string]namespaceMeta
		secrets    map[string]impsync.Existing
		blind      bool // Secrets cannot be seen
		partial    bool // namespaces cannot be listed
		demand     []string
		rivals     map[string]time.Duration // that select everything, by their age; the resource's is an hour
		refused    bool
		want       []string // "<namespace> <selected by> <outcome>"
		conflicts  []ConflictKind
		notes      []string
	}{
		"no selector selects nothing":        {spec: `{}`},
		"by name":                            {spec: `{namespaces: {names: [a]}}`, want: []string{"a [name] create"}},
		"by label":                           {spec: `{namespaces: {labels: [{matchLabels: {team: a}}]}}`, want: []string{"a [label] create"}},
		"by another label not":               {spec: `{namespaces: {labels: [{matchLabels: {team: b}}]}}`},
		"by annotation":                      {spec: `{namespaces: {annotations: [{}]}}`, want: []string{"a [annotation] create"}},
		"by Pods":                            {spec: `{namespacesWithPods: {labels: [{}]}}`, demand: []string{"a"}, want: []string{"a [pods] create"}},
		"by everything":                      {spec: `{namespaces: {names: [a], labels: [{}], annotations: [{}]}}`, demand: []string{"a"}, want: []string{"a [name label annotation pods] create"}},
		"ours is updated":                    {spec: `{namespaces: {names: [a]}}`, secrets: map[string]impsync.Existing{"a": ours(own)}, want: []string{"a [name] update"}},
		"ours of another owner is adopted":   {spec: `{namespaces: {names: [a]}}`, secrets: map[string]impsync.Existing{"a": ours("uid-gone")}, want: []string{"a [name] adopt"}},
		"one that IMPS wrote is adopted":     {spec: `{namespaces: {names: [a]}}`, secrets: map[string]impsync.Existing{"a": {Ownership: impsync.Legacy, OwnerUID: own}}, want: []string{"a [name] adopt"}},
		"one from a backup is adopted":       {spec: `{namespaces: {names: [a]}}`, secrets: map[string]impsync.Existing{"a": {Ownership: impsync.Restored, OwnerUID: own}}, want: []string{"a [name] adopt"}},
		"a foreign one is in the way":        {spec: `{namespaces: {names: [a]}}`, secrets: map[string]impsync.Existing{"a": {}}, want: []string{"a [name] foreign"}, conflicts: []ConflictKind{ConflictForeign}},
		"one with a finalizer is in the way": {spec: `{namespaces: {names: [a]}}`, secrets: map[string]impsync.Existing{"a": {Ownership: impsync.Ours, OwnerUID: own, Deleting: true}}, want: []string{"a [name] held"}, conflicts: []ConflictKind{ConflictHeld}},
		"a foreign one elsewhere is not":     {spec: `{namespaces: {names: [a]}}`, secrets: map[string]impsync.Existing{"b": {}}, want: []string{"a [name] create"}},
		"an older resource wins": {
			spec: `{namespaces: {names: [a]}}`, rivals: map[string]time.Duration{"older": 2 * time.Hour},
			secrets: map[string]impsync.Existing{"a": ours(older)},
			want:    []string{"a [name] claimed"}, conflicts: []ConflictKind{ConflictOlder},
		},
		"a younger resource loses": {
			spec: `{namespaces: {names: [a]}}`, rivals: map[string]time.Duration{"younger": 0},
			want: []string{"a [name] create"}, conflicts: []ConflictKind{ConflictYounger},
		},
		"of two of one age the name decides": {
			spec: `{namespaces: {names: [a]}}`, rivals: map[string]time.Duration{"aaa": time.Hour, "zzz": time.Hour},
			want: []string{"a [name] claimed"}, conflicts: []ConflictKind{ConflictOlder, ConflictYounger},
		},
		"what is not known is not guessed": {spec: `{namespaces: {names: [a]}}`, blind: true, want: []string{"a [name] unknown"}},
		"excluded and terminating ones get nothing": {
			spec: `{namespaces: {labels: [{}]}}`,
			namespaces: map[string]namespaceMeta{
				"kube-system": {}, "kube-public": {terminating: true}, "going": {terminating: true}, "a": {},
			},
			secrets: map[string]impsync.Existing{"kube-system": {}, "going": {}},
			want:    []string{"a [label] create", "going [label] terminating", "kube-public [label] excluded", "kube-system [label] excluded"},
			notes: []string{
				"namespaces that get nothing, as --excluded-namespaces (kube-*) has them: 2",
				"namespaces that get nothing, as they are being deleted: 1",
			},
		},
		"names that are not there yet": {
			spec: `{namespaces: {names: [a, later]}}`, want: []string{"a [name] create"},
			notes: []string{`namespace "later" does not exist; it gets the Secret once it does`},
		},
		"a resource that is refused delivers nothing": {
			spec: `{namespaces: {names: [a]}}`, refused: true, secrets: map[string]impsync.Existing{"a": {}}, want: []string{"a [name] refused"},
		},
		"without a list of namespaces names and Pods are what is known": {
			spec:       `{namespaces: {names: [b, a], labels: [{}]}}`,
			namespaces: map[string]namespaceMeta{}, partial: true, demand: []string{"c", "a"},
			secrets: map[string]impsync.Existing{"b": {}},
			want:    []string{"a [name pods] create", "b [name] foreign", "c [pods] create"}, conflicts: []ConflictKind{ConflictForeign},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := plannedResource(t, "own", `{target: `+test.spec+`, registry: {}}`)
			p := newTestPlanner(r)
			p.refused = test.refused
			view := &clusterView{namespaces: test.namespaces, complete: !test.partial, secrets: test.secrets, seesSecrets: !test.blind}
			if view.namespaces == nil {
				view.namespaces = map[string]namespaceMeta{"a": labelled}
			}
			for rival, age := range test.rivals {
				all := plannedResource(t, rival, `{target: {namespaces: {labels: [{}]}}, registry: {}}`)
				view.rivals = append(view.rivals, newPlannedClaim(ref(rival, types.UID("uid-"+rival), age), all, true))
			}
			claim := newPlannedClaim(ref("own", own, time.Hour), r, !test.partial)
			for _, namespace := range test.demand {
				claim.demand[namespace] = struct{}{}
			}
			p.judge(view, claim)

			var got []string
			for _, n := range p.result.Namespaces {
				got = append(got, fmt.Sprintf("%s %v %s", n.Name, n.SelectedBy, n.Outcome))
			}
			require.Equal(t, test.want, got)
			var kinds []ConflictKind
			for _, c := range p.result.Conflicts {
				require.NotEmpty(t, c.Namespace)
				kinds = append(kinds, c.Kind)
			}
			require.ElementsMatch(t, test.conflicts, kinds)
			require.Equal(t, test.notes, p.result.Notes)
		})
	}
}

func TestPlanOfSpec(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		spec      string
		refused   bool
		conflicts []string
	}{
		"nothing at all is nothing wrong": {spec: `{target: {}, registry: {}}`},
		"a name that is allowed":          {spec: `{target: {secret: {name: pull-b}, namespaces: {labels: [{}]}}, registry: {}}`},
		"a name that is not allowed": {
			spec: `{target: {secret: {name: mine}}, registry: {}}`, refused: true,
			conflicts: []string{`NotAllowed: spec.target.secret.name "mine" is not in --target-secret-names (pull, pull-b): add it to the chart's value targetSecretNames`},
		},
		"selectors without a name": {
			spec: `{target: {namespaces: {names: [a]}}, registry: {}}`, refused: true,
			conflicts: []string{"InvalidSpec: spec.target.secret.name is empty"},
		},
		"a selector that cannot be evaluated": {
			spec:      `{target: {secret: {name: pull}, namespaces: {labels: [{matchExpressions: [{key: a, operator: Foo}]}]}}, registry: {}}`,
			refused:   true,
			conflicts: []string{`InvalidSpec: spec.target.namespaces.labels[0]: "Foo" is not a valid label selector operator`},
		},
		"a Pod selector that cannot be evaluated": {
			spec:      `{target: {secret: {name: pull}, namespacesWithPods: {annotations: [{matchExpressions: [{key: a, operator: In}]}]}}, registry: {}}`,
			conflicts: []string{`InvalidSpec: spec.target.namespacesWithPods.annotations[0]: operator In of annotation "a" needs values; this selector is left out, the others are served`},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTestPlanner(plannedResource(t, "own", test.spec))
			p.checkSpec()
			var conflicts []string
			for _, c := range p.result.Conflicts {
				conflicts = append(conflicts, string(c.Kind)+": "+c.Message)
			}
			require.Equal(t, test.conflicts, conflicts)
			require.Equal(t, test.refused, p.refused)
		})
	}
}

func TestPlanOfRegistriesAgreesWithTheMerge(t *testing.T) {
	t.Parallel()
	source := func(key string, registries ...string) planSource {
		var entries []dockerconfig.Entry
		for _, registry := range registries {
			entries = append(entries, dockerconfig.Entry{
				Key: dockerconfig.NewSensitive(registry), Username: dockerconfig.NewSensitive(key), Password: dockerconfig.NewSensitive("p4ssw0rd"),
			})
		}
		config, err := dockerconfig.New(entries...)
		require.NoError(t, err)
		return planSource{key: key, config: config}
	}
	sources := []planSource{
		source("ns.first", "quay.io", "docker.io", "ghcr.io/team"),
		source("ns.second", "https://index.docker.io/v1/", "index.docker.io", "ghcr.io"),
		source("ns.third", "https://quay.io/v1/", "*.example.com"),
	}
	merged := mergeSources(sources)
	registries := plannedRegistries(sources, merged)
	require.Equal(t, []PlannedRegistry{
		{Registry: "*.example.com", Source: "ns.third"},
		{Registry: "ghcr.io", Source: "ns.second"},
		{Registry: "ghcr.io/team", Source: "ns.first"},
		{Registry: "https://index.docker.io/v1/", Source: "ns.second", Overrides: []string{"ns.first"}},
		{Registry: "https://quay.io/v1/", Source: "ns.third", Overrides: []string{"ns.first"}},
		{Registry: "index.docker.io", Source: "ns.second", Overrides: []string{"ns.first"}},
	}, registries)
	// The user name of each credential is the key of its source.
	for _, e := range merged.Entries() {
		for _, r := range registries {
			if r.Registry == e.Registry() {
				require.Equal(t, e.Username.Reveal(), r.Source)
			}
		}
	}
	printed := fmt.Sprintf("%+v %#v", registries, registries)
	require.NotContains(t, printed, "p4ssw0rd")
	require.NotContains(t, printed, base64.StdEncoding.EncodeToString([]byte("p4ssw0rd")))
}

func TestPlanKnowsWhoWasFirst(t *testing.T) {
	t.Parallel()
	const spec = `{target: {secret: {name: pull}}, registry: {}}`
	inCluster := map[string]*v1alpha1.ImagePullSecret{}
	for name, age := range map[string]time.Duration{"old": 2 * time.Hour, "own": time.Hour, "changed": time.Hour, "going": time.Hour, "elsewhere": time.Hour} {
		r := plannedResource(t, name, spec)
		r.UID, r.CreationTimestamp = types.UID("uid-"+name), metav1.NewTime(time.Now().Add(-age))
		inCluster[name] = r
	}
	inCluster["elsewhere"].Spec.Target.Secret.Name = "pull-b"
	now := metav1.Now()
	inCluster["going"].DeletionTimestamp = &now
	alongside := []*v1alpha1.ImagePullSecret{
		plannedResource(t, "own", spec), plannedResource(t, "next", spec),
		plannedResource(t, "changed", `{target: {secret: {name: pull-b}}, registry: {}}`),
	}

	self, others := claimants(inCluster, alongside, alongside[0])
	require.Equal(t, impsync.RefOf(inCluster["own"]), self, "it is the one of the cluster")
	var names []string
	for _, other := range others {
		names = append(names, other.Name)
	}
	require.Equal(t, []string{"next", "old"}, names)
	require.Positive(t, impsync.RefOf(others[0]).Compare(self), "new ones are younger")
	require.Negative(t, impsync.RefOf(others[1]).Compare(self))

	self, _ = claimants(inCluster, alongside, alongside[1])
	require.Empty(t, self.UID)
	require.WithinDuration(t, time.Now(), self.CreationTimestamp.Time, time.Minute)
	require.Empty(t, alongside[1].CreationTimestamp, "what was handed in is as it was")
}
