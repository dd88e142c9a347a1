package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	impsync "github.com/imps-node/imps/pkg/sync"
)

// Targets of resources.
const (
	everywhere = `{secret: {name: pull}, namespaces: {labels: [{}]}}`
	byPods     = `{secret: {name: pull}, namespacesWithPods: {labels: [{matchLabels: {app: web}}]}}`
	byName     = `{secret: {name: pull}, namespaces: {names: [a]}}`
	byLabel    = `{secret: {name: pull}, namespaces: {labels: [{matchLabels: {team: red}}]}}`

	byLabelOrPods = `{secret: {name: pull}, namespaces: {labels: [{matchLabels: {team: red}}]}, namespacesWithPods: {labels: [{matchLabels: {app: web}}]}}`
)

var web = map[string]string{"app": "web"}

// inBubble runs a test of an Agent in a synctest bubble.
func inBubble(t *testing.T, test func(t *testing.T, a *testAgent)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) { test(t, newTestAgent(t)) })
}

func TestNewRefusesWhatCannotWork(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		edit func(*Config)
		says string
	}{
		"as it should be":           {func(*Config) {}, ""},
		"no node":                   {func(c *Config) { c.NodeName = "" }, "--node-name or NODE_NAME"},
		"no namespace":              {func(c *Config) { c.Namespace = "" }, "namespaces"},
		"no namespace to read from": {func(c *Config) { c.RenderedNamespace = "" }, "namespaces"},
		"no certificate where it says": {func(c *Config) {
			c.Client = &rest.Config{TLSClientConfig: rest.TLSClientConfig{CAFile: "/does/not/exist"}}
		}, "connection to the API server"},
		"a host that is none": {func(c *Config) { c.Client = &rest.Config{Host: "http://a b"} }, "client"},
	} {
		registry := prometheus.NewRegistry()
		config := Config{
			NodeName: "n", Namespace: "a", RenderedNamespace: "b", Client: &rest.Config{Host: "http://127.0.0.1:1"},
			Metrics: impsync.NewMetrics(registry), Registry: registry, Log: slog.New(slog.DiscardHandler),
		}
		test.edit(&config)
		a, err := New(config)
		if test.says == "" {
			require.NoError(t, err, name)
			require.Error(t, a.Ready(), "nothing was read yet")
			close(a.ready)
			require.NoError(t, a.Ready())
			_, err = New(config)
			require.ErrorContains(t, err, "metrics")
			continue
		}
		require.ErrorContains(t, err, test.says, name)
	}
}

func TestIsWaiting(t *testing.T) {
	t.Parallel()
	now := metav1.Now()
	running := corev1.ContainerStatus{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}
	ended := corev1.ContainerStatus{State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}}
	pulling := corev1.ContainerStatus{State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff"}}}
	crashed := corev1.ContainerStatus{
		State:                corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}},
		LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}},
	}
	restarting := corev1.ContainerStatus{LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}}
	tests := map[string]struct {
		inits, containers      int
		initStatuses, statuses []corev1.ContainerStatus
		phase                  corev1.PodPhase
		deleting               bool
		want                   bool
	}{
		"bound, and nothing started":                     {containers: 1, phase: corev1.PodPending, want: true},
		"no phase yet":                                   {containers: 1, want: true},
		"it is being pulled":                             {containers: 1, statuses: []corev1.ContainerStatus{pulling}, phase: corev1.PodPending, want: true},
		"it runs":                                        {containers: 1, statuses: []corev1.ContainerStatus{running}, phase: corev1.PodRunning},
		"one of two runs":                                {containers: 2, statuses: []corev1.ContainerStatus{running, pulling}, phase: corev1.PodPending, want: true},
		"both run":                                       {containers: 2, statuses: []corev1.ContainerStatus{running, running}, phase: corev1.PodRunning},
		"one ended, one runs":                            {containers: 2, statuses: []corev1.ContainerStatus{ended, running}, phase: corev1.PodRunning},
		"it crashes, but its image is there":             {containers: 1, statuses: []corev1.ContainerStatus{crashed}, phase: corev1.PodRunning},
		"it starts again, and its image is there":        {containers: 1, statuses: []corev1.ContainerStatus{restarting}, phase: corev1.PodRunning},
		"an init container runs, the other waits for it": {inits: 1, containers: 1, initStatuses: []corev1.ContainerStatus{running}, statuses: []corev1.ContainerStatus{pulling}, want: true},
		"the init container ended, the other is pulled":  {inits: 1, containers: 1, initStatuses: []corev1.ContainerStatus{ended}, statuses: []corev1.ContainerStatus{pulling}, want: true},
		"the init container ended, the other runs":       {inits: 1, containers: 1, initStatuses: []corev1.ContainerStatus{ended}, statuses: []corev1.ContainerStatus{running}, phase: corev1.PodRunning},
		"the first of two init containers ended":         {inits: 2, containers: 1, initStatuses: []corev1.ContainerStatus{ended, pulling}, statuses: []corev1.ContainerStatus{pulling}, want: true},
		"a sidecar runs beside":                          {inits: 1, containers: 1, initStatuses: []corev1.ContainerStatus{running}, statuses: []corev1.ContainerStatus{running}, phase: corev1.PodRunning},
		"only some statuses are there yet":               {containers: 2, statuses: []corev1.ContainerStatus{running}, phase: corev1.PodRunning, want: true},
		"it is being deleted":                            {containers: 1, deleting: true},
		"it has succeeded":                               {containers: 1, phase: corev1.PodSucceeded},
		"it has failed before it started":                {containers: 1, statuses: []corev1.ContainerStatus{pulling}, phase: corev1.PodFailed},
		"the kubelet is away, and nothing started":       {containers: 1, phase: corev1.PodUnknown, want: true},
	}
	for name, test := range tests {
		p := &corev1.Pod{Status: corev1.PodStatus{Phase: test.phase, InitContainerStatuses: test.initStatuses, ContainerStatuses: test.statuses}}
		p.Spec.InitContainers, p.Spec.Containers = make([]corev1.Container, test.inits), make([]corev1.Container, test.containers)
		if test.deleting {
			p.DeletionTimestamp = &now
		}
		require.Equal(t, test.want, isWaiting(p), name)
	}
}

func TestOnlyWhatDecidesIsKeptOfAPod(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "x", Labels: web, Annotations: map[string]string{"a": "1"}}}
		p.Spec.Containers = []corev1.Container{{Env: []corev1.EnvVar{{Name: "TOKEN", Value: canary}}}}
		kept := convertPod(p)
		require.Equal(t, pod{labels: web, annotations: map[string]string{"a": "1"}, waiting: true, live: true}, kept)
	})
}

func TestOnlyARenderedSecretIsTakenForOne(t *testing.T) {
	t.Parallel()
	data, err := impsync.EncodeRendered(rendered(t, "r", 0, everywhere, 7))
	require.NoError(t, err)
	now := metav1.Now()
	secret := func(edit func(*corev1.Secret)) *corev1.Secret {
		s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "imps-rendered-uid-r"}, Type: impsync.RenderedType, Data: data}
		edit(s)
		return s
	}
	convert := newTestAgent(t).convertRendered
	got := convert(secret(func(*corev1.Secret) {}))
	require.NoError(t, got.err)
	require.False(t, got.deleting)
	require.Equal(t, uint64(7), got.rendered.Target.Revision().Counter)
	require.NotContains(t, fmt.Sprintf("%v %+v %#v", got, got, got), canary)

	require.True(t, convert(secret(func(s *corev1.Secret) { s.DeletionTimestamp = &now })).deleting)
	for name, edit := range map[string]func(*corev1.Secret){
		"another type": func(s *corev1.Secret) { s.Type = corev1.SecretTypeDockerConfigJson },
		"another name": func(s *corev1.Secret) { s.Name = "pull" },
		"no data":      func(s *corev1.Secret) { s.Data = nil },
	} {
		got := convert(secret(edit))
		require.Error(t, got.err, name)
		require.True(t, got.rendered.Target.IsZero(), name)
	}
}

func TestANamespaceIsWatchedWhilePodsWaitInItAndItsLabelsMatter(t *testing.T) {
	inBubble(t, func(t *testing.T, a *testAgent) {
		a.serves(rendered(t, "r", 0, byLabel, 7))
		serve := func(watched bool, why string) {
			t.Helper()
			_ = a.serve(t.Context(), "a") // there is no server to answer
			require.Equal(t, watched, a.watched["a"], why)
		}
		a.pod("a", "1", &pod{waiting: true})
		a.pod("a", "2", &pod{waiting: true})
		a.pod("b", "1", &pod{})
		require.Equal(t, []string{"a"}, a.queued(), "nothing waits in b")
		require.True(t, a.isDirty())
		serve(true, "its labels may select it")
		serve(true, "and again")

		a.pod("a", "1", nil)
		require.True(t, a.watched["a"])
		require.True(t, a.isDirty())
		require.Empty(t, a.queued())
		a.pod("a", "2", &pod{})
		require.Empty(t, a.watched, "it has started")
		require.NotContains(t, a.namespaces, "a")
		a.pod("a", "3", &pod{waiting: true})
		require.Nil(t, a.namespaces["a"].known, "what was known of it is forgotten")
		serve(true, "another Pod waits")

		a.pod("a", "3", nil)
		a.serves(rendered(t, "r", 0, byLabelOrPods, 8))
		a.pod("a", "4", &pod{waiting: true, labels: web})
		serve(false, "its Pods select it")
		a.pod("a", "4", &pod{waiting: true})
		serve(true, "they do no more")
		require.Empty(t, a.watched["b"])
	})
}

func TestAPodIsLookedAtWhenItArrivesOrIsRelabelled(t *testing.T) {
	inBubble(t, func(t *testing.T, a *testAgent) {
		look := func(p *pod, queued, dirty bool, why string) {
			t.Helper()
			a.pod("a", "1", p)
			require.Equal(t, queued, len(a.queued()) == 1, why)
			require.Equal(t, dirty, a.isDirty(), why)
		}
		annotated := map[string]string{"x": "1"}
		look(&pod{waiting: true}, true, true, "it arrives")
		look(&pod{waiting: true}, false, false, "its status changes: an event storm moves nothing (B9)")
		look(&pod{waiting: false}, false, false, "it starts")
		look(&pod{labels: web}, false, true, "it runs and is relabelled: that is demand, but nothing waits")
		look(&pod{labels: web, waiting: true}, true, false, "it waits again")
		look(&pod{labels: web, annotations: annotated, waiting: true}, true, true, "it waits and is annotated")
		look(nil, false, true, "it is gone")

		a.pod("a", "2", &pod{waiting: true})
		a.queued()
		look(&pod{}, true, true, "one that runs arrives beside one that waits: it may select the namespace for both")
		look(&pod{labels: web}, true, true, "so may its labels")
		look(nil, false, true, "its end does not")
	})
}

func TestRenderedSecretsComeIntoForce(t *testing.T) {
	inBubble(t, func(t *testing.T, a *testAgent) {
		a.pod("a", "1", &pod{waiting: true})
		a.pod("b", "1", &pod{})
		a.queued()
		a.isDirty()
		key := types.NamespacedName{Namespace: "imps-rendered", Name: "imps-rendered-uid-r"}
		see := func(current *renderedSecret) (queued []string, dirty bool) {
			a.renderedChanged(key, nil, current)
			return a.queued(), a.isDirty()
		}
		first := rendered(t, "r", 0, everywhere, 7)

		queued, dirty := see(&renderedSecret{rendered: first})
		require.Equal(t, []string{"a"}, queued, "it may select any namespace in which Pods wait")
		require.True(t, dirty)
		require.Equal(t, uint64(7), a.active[key.Name].Target.Revision().Counter)

		queued, dirty = see(&renderedSecret{rendered: rendered(t, "r", 0, everywhere, 8)})
		require.Empty(t, queued, "a rotation writes nothing")
		require.False(t, dirty)
		require.Equal(t, uint64(8), a.active[key.Name].Target.Revision().Counter, "but the next Secret is new")

		queued, dirty = see(&renderedSecret{err: errors.New("x")})
		require.Empty(t, queued)
		require.False(t, dirty)
		require.Equal(t, uint64(8), a.active[key.Name].Target.Revision().Counter, "what cannot be read changes nothing")
		unusable := rendered(t, "r", 0, everywhere, 9)
		unusable.Namespaces.Labels = []metav1.LabelSelector{{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "a", Operator: "Foo"}}}}
		queued, _ = see(&renderedSecret{rendered: unusable})
		require.Empty(t, queued)
		require.Equal(t, uint64(8), a.active[key.Name].Target.Revision().Counter, "nor what cannot be used")
		require.NotContains(t, a.log.String(), canary)

		queued, dirty = see(&renderedSecret{rendered: rendered(t, "r", 0, byPods, 10)})
		require.Equal(t, []string{"a"}, queued, "other selectors")
		require.True(t, dirty)
		require.True(t, a.active[key.Name].selection.HasPodRules())
		queued, _ = see(&renderedSecret{rendered: rendered(t, "r", 0, `{secret: {name: other}, namespacesWithPods: {labels: [{matchLabels: {app: web}}]}}`, 11)})
		require.Equal(t, []string{"a"}, queued, "another name")

		queued, dirty = see(&renderedSecret{rendered: first, deleting: true})
		require.Equal(t, []string{"a"}, queued, "another may come into its place")
		require.True(t, dirty)
		require.Empty(t, a.active, "one that is being deleted is in force no more")
		see(&renderedSecret{rendered: first})
		_, dirty = see(nil)
		require.True(t, dirty)
		require.Empty(t, a.active)
	})
}

func TestWantedIsTheTargetOfTheOldestForEachName(t *testing.T) {
	t.Parallel()
	red := &namespaceMeta{labels: map[string]string{"team": "red"}}
	tests := map[string]struct {
		rendered map[string]string // spec.target by name; "o" is older than "m", and that than "y"
		meta     *namespaceMeta
		pods     []pod
		want     map[string]string // resource by target
	}{
		"nothing is rendered":           {nil, red, nil, nil},
		"one selects by rule":           {map[string]string{"m": byName}, red, nil, map[string]string{"pull": "m"}},
		"one selects another namespace": {map[string]string{"m": `{secret: {name: pull}, namespaces: {names: [b]}}`}, red, nil, nil},
		"one selects by label": {
			map[string]string{"m": `{secret: {name: pull}, namespaces: {labels: [{matchLabels: {team: red}}]}}`}, red, nil, map[string]string{"pull": "m"},
		},
		"one selects by annotation that is not there": {
			map[string]string{"m": `{secret: {name: pull}, namespaces: {annotations: [{matchAnnotations: {team: red}}]}}`}, red, nil, nil,
		},
		"one selects by Pods":          {map[string]string{"m": byPods}, red, []pod{{}, {labels: web}}, map[string]string{"pull": "m"}},
		"one selects by other Pods":    {map[string]string{"m": byPods}, red, []pod{{}}, nil},
		"the oldest of three wins":     {map[string]string{"y": everywhere, "o": everywhere, "m": everywhere}, red, nil, map[string]string{"pull": "o"}},
		"the oldest that selects wins": {map[string]string{"y": everywhere, "o": byPods, "m": everywhere}, red, nil, map[string]string{"pull": "m"}},
		"each name has its own": {
			map[string]string{"y": `{secret: {name: other}, namespaces: {labels: [{}]}}`, "o": everywhere, "m": everywhere},
			red, nil, map[string]string{"pull": "o", "other": "y"},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, a *testAgent) {
				for name, target := range test.rendered {
					a.serves(rendered(t, name, map[string]int{"o": 0, "m": 1, "y": 2}[name], target, 1))
				}
				got := map[string]string{}
				wanted, decided := a.wanted("a", test.meta, test.pods)
				require.True(t, decided)
				for target, winner := range wanted {
					require.Equal(t, target, winner.Target.Name())
					got[target] = winner.Resource.Name
				}
				if test.want == nil {
					test.want = map[string]string{}
				}
				require.Equal(t, test.want, got)
			})
		})
	}
}

func TestOfResourcesOfTheSameAgeTheNameDecides(t *testing.T) {
	inBubble(t, func(t *testing.T, a *testAgent) {
		for _, name := range []string{"c", "b", "d"} {
			a.serves(rendered(t, name, 0, everywhere, 1))
		}
		wanted, _ := a.wanted("a", &namespaceMeta{}, nil)
		require.Equal(t, "b", wanted["pull"].Resource.Name)
	})
}

func TestLabelsOfANamespaceAreAskedForOnlyWhereTheyDecide(t *testing.T) {
	t.Parallel()
	const byAnnotation = `{secret: {name: pull}, namespaces: {annotations: [{matchAnnotations: {team: red}}]}}`
	tests := map[string]struct {
		rendered map[string]string // as in the test of what is wanted
		decided  bool
		winner   string // as far as it is known
	}{
		"nothing is rendered":                     {nil, true, ""},
		"a name selects":                          {map[string]string{"m": byName}, true, "m"},
		"a Pod selects":                           {map[string]string{"m": byPods}, true, "m"},
		"a Pod selects, and so may a label":       {map[string]string{"m": byLabelOrPods}, true, "m"},
		"an empty entry selects all":              {map[string]string{"m": everywhere}, true, "m"},
		"an empty entry of annotations does, too": {map[string]string{"m": `{secret: {name: pull}, namespaces: {annotations: [{}]}}`}, true, "m"},
		"a label may select":                      {map[string]string{"m": byLabel}, false, ""},
		"an annotation may select":                {map[string]string{"m": byAnnotation}, false, ""},
		"that a label is missing may select":      {map[string]string{"m": `{secret: {name: pull}, namespaces: {labels: [{matchExpressions: [{key: x, operator: DoesNotExist}]}]}}`}, false, ""},
		"an older one may, by a label":            {map[string]string{"o": byLabel, "m": byPods}, false, "m"},
		"a younger one may, by a label: it loses": {map[string]string{"y": byLabel, "m": byPods}, true, "m"},
		"a label may select for another Secret":   {map[string]string{"m": byPods, "y": `{secret: {name: other}, namespaces: {labels: [{matchLabels: {team: red}}]}}`}, false, "m"},
		"a name and Pods of others do not select": {map[string]string{"m": `{secret: {name: pull}, namespaces: {names: [b]}, namespacesWithPods: {labels: [{matchLabels: {app: db}}]}}`}, true, ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, a *testAgent) {
				for name, target := range test.rendered {
					a.serves(rendered(t, name, map[string]int{"o": 0, "m": 1, "y": 2}[name], target, 1))
				}
				wanted, decided := a.wanted("a", nil, []pod{{labels: web}})
				require.Equal(t, test.decided, decided)
				winner := ""
				if w := wanted["pull"]; w != nil {
					winner = w.Resource.Name
				}
				require.Equal(t, test.winner, winner)
			})
		})
	}
}

func TestPodsOfANamespaceAndTheLongestWaiting(t *testing.T) {
	inBubble(t, func(t *testing.T, a *testAgent) {
		second := func() { <-time.After(time.Second) }
		a.pod("b", "1", &pod{waiting: true})
		a.pod("a", "1", &pod{})
		second()
		since := time.Now()
		a.pod("a", "2", &pod{waiting: true})
		second()
		a.pod("a", "3", &pod{waiting: true})
		a.pod("c", "1", &pod{})
		a.pod("a", "2", &pod{waiting: true, labels: web}) // an event of it changes nothing about that
		pods, oldest := a.podsOf("a")
		require.Len(t, pods, 3)
		require.Equal(t, since, oldest)
		_, oldest = a.podsOf("c")
		require.Zero(t, oldest, "nothing waits")
		pods, oldest = a.podsOf("d")
		require.Empty(t, pods)
		require.Zero(t, oldest)
		a.pod("a", "2", nil)
		require.NotContains(t, a.seen, types.NamespacedName{Namespace: "a", Name: "2"})
	})
}

func TestANamespaceIsLookedAtAgainWhenItChanges(t *testing.T) {
	inBubble(t, func(t *testing.T, a *testAgent) {
		a.pod("a", "1", &pod{waiting: true})
		a.queued()
		a.known("a", web)
		require.Empty(t, a.queued(), "the Pod's own look is under way")
		a.known("a", map[string]string{"app": "web"})
		require.Empty(t, a.queued(), "nothing has changed")
		a.known("a", nil)
		require.Equal(t, []string{"a"}, a.queued())
		require.Nil(t, a.namespaces["a"].known.labels)
		a.namespaceRead(t.Context(), "a", a.namespaces["a"], &namespaceMeta{terminating: true})
		require.Equal(t, []string{"a"}, a.queued())
	})
}

func TestANamespaceThatCouldNotBeReadIsLookedAtWhenTheWatchBringsIt(t *testing.T) {
	inBubble(t, func(t *testing.T, a *testAgent) {
		a.pod("a", "1", &pod{waiting: true})
		a.queued()
		_, err := a.readNamespace(t.Context(), "a")
		require.Error(t, err)
		a.known("a", web)
		require.Equal(t, []string{"a"}, a.queued())
	})
}

func TestAPodThatWasReplacedUnseenIsAnotherOne(t *testing.T) {
	inBubble(t, func(t *testing.T, a *testAgent) {
		a.pod("a", "web-0", &pod{uid: "1", waiting: true})
		a.queued()
		was := a.seen[types.NamespacedName{Namespace: "a", Name: "web-0"}]
		<-time.After(time.Second)
		a.pod("a", "web-0", &pod{uid: "2", waiting: true})
		require.Equal(t, []string{"a"}, a.queued())
		require.Equal(t, was.Add(time.Second), a.seen[types.NamespacedName{Namespace: "a", Name: "web-0"}])
		require.Equal(t, 1, a.namespaces["a"].waiting)
	})
}

func TestWhatTheWatchKnowsOfANamespaceIsNotAskedFor(t *testing.T) {
	inBubble(t, func(t *testing.T, a *testAgent) {
		meta, err := a.readNamespace(t.Context(), "a")
		require.NoError(t, err)
		require.True(t, meta.terminating, "without Pods here it is no matter")

		a.pod("a", "1", &pod{waiting: true})
		_, err = a.readNamespace(t.Context(), "a")
		require.ErrorContains(t, err, "read namespace a")
		require.Equal(t, []string{"GET /api/v1/namespaces/a"}, a.server.asked(), "the watch has not brought it yet")
		a.known("a", web)
		meta, err = a.readNamespace(t.Context(), "a")
		require.NoError(t, err)
		require.Equal(t, web, meta.labels)
		require.Empty(t, a.server.asked())
	})
}

func TestServe(t *testing.T) {
	t.Parallel()
	const get = "GET /api/v1/namespaces/a/secrets/pull"
	tests := map[string]struct {
		namespace string
		setUp     func(a *testAgent)
		asked     []string
	}{
		"a Pod waits in a selected namespace: is its Secret there?": {"a", func(*testAgent) {}, []string{get}},
		"nothing waits: nothing is done, also on the agent's start": {"a", func(a *testAgent) {
			a.pod("a", "1", &pod{})
		}, nil},
		"the namespace is excluded": {"kube-system", func(a *testAgent) {
			a.pod("kube-system", "1", &pod{waiting: true})
			a.known("kube-system", nil)
		}, nil},
		"the namespace is going": {"a", func(a *testAgent) {
			a.namespaceRead(t.Context(), "a", a.namespaces["a"], &namespaceMeta{terminating: true})
		}, nil},
		"no Pod of the namespace waits any more": {"a", func(a *testAgent) { a.pod("a", "1", nil) }, nil},
		"nothing selects it": {"b", func(a *testAgent) {
			a.pod("b", "1", &pod{waiting: true})
			a.known("b", nil)
		}, nil},
		"two resources want one Secret": {"a", func(a *testAgent) { a.serves(rendered(t, "s", 0, everywhere, 1)) }, []string{get}},
		"two resources want two Secrets": {"a", func(a *testAgent) {
			a.serves(rendered(t, "s", 0, `{secret: {name: other}, namespaces: {labels: [{}]}}`, 1))
		}, []string{"GET /api/v1/namespaces/a/secrets/other", get}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, a *testAgent) {
				a.serves(rendered(t, "r", 0, byName, 7))
				a.pod("a", "1", &pod{waiting: true})
				a.known("a", nil)
				test.setUp(a)
				err := a.serve(t.Context(), test.namespace)
				require.Equal(t, len(test.asked) > 0, err != nil, err)
				asked := a.server.asked()
				slices.Sort(asked)
				require.Equal(t, test.asked, asked)
			})
		})
	}
}

func TestANamespaceThatCouldNotBeServedComesBack(t *testing.T) {
	inBubble(t, func(t *testing.T, a *testAgent) {
		a.serves(rendered(t, "r", 0, byName, 7))
		a.pod("a", "1", &pod{waiting: true})
		a.known("a", nil)
		require.True(t, a.next(t.Context(), t.Context()))
		for _, after := range []time.Duration{50 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond} {
			<-time.After(after - 1)
			synctest.Wait()
			require.Zero(t, a.queue.Len())
			<-time.After(1)
			synctest.Wait()
			require.Equal(t, 1, a.queue.Len())
			require.True(t, a.next(t.Context(), t.Context()))
		}
		require.NotContains(t, a.log.String(), canary)
		require.NotContains(t, a.log.String(), "level=WARN", "what passes is told of by the watches")
		for range failuresToTell - 5 {
			<-time.After(time.Minute)
			synctest.Wait()
			require.True(t, a.next(t.Context(), t.Context()))
		}
		require.Equal(t, 1, strings.Count(a.log.String(), "level=WARN"), "but it goes on")
		require.Contains(t, a.log.String(), "class=retry")
		require.Len(t, a.server.asked(), failuresToTell)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		a.queue.Add("a")
		require.False(t, a.next(ctx, t.Context()), "what is in the queue at the end stays undone")
		require.Empty(t, a.server.asked())
		a.queue.ShutDown()
		require.False(t, a.next(t.Context(), t.Context()))
	})
}

func TestAnAgentWithoutAServerSaysItOnceAndEndsWhenItIsTold(t *testing.T) {
	inBubble(t, func(t *testing.T, a *testAgent) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- a.Run(ctx) }()
		<-time.After(10 * time.Minute)
		synctest.Wait()
		require.Error(t, a.Ready())
		for _, request := range a.server.asked() {
			require.Regexp(t, "^GET ", request, "nothing is written before everything was read")
		}
		require.Equal(t, 3, strings.Count(a.log.String(), "\n"), "one line for each watch")
		require.Equal(t, 3, strings.Count(a.log.String(), "watch failed"))
		start := time.Now()
		cancel()
		require.NoError(t, <-done)
		require.Less(t, time.Since(start), impsync.Grace)
	})
}
