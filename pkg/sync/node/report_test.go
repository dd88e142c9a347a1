package node

import (
	"cmp"
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	impsync "github.com/imps-node/imps/pkg/sync"
)

func TestCurrentReport(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		rendered map[string]string
		pods     map[string][]pod // by namespace
		want     map[string][]types.UID
	}{
		"nothing": {want: map[string][]types.UID{}},
		"no Pods": {rendered: map[string]string{"r": byPods}, want: map[string][]types.UID{}},
		"no Pod rules: no demand": {
			rendered: map[string]string{"r": everywhere}, pods: map[string][]pod{"a": {{labels: web}}}, want: map[string][]types.UID{},
		},
		"a Pod matches, of any state (K5)": {
			rendered: map[string]string{"r": byPods}, pods: map[string][]pod{"a": {{labels: web}}, "b": {{labels: web, waiting: true}}, "c": {{}}},
			want: map[string][]types.UID{"a": {"uid-r"}, "b": {"uid-r"}},
		},
		"several Pods match: one demand": {
			rendered: map[string]string{"r": byPods}, pods: map[string][]pod{"a": {{labels: web}, {labels: web}, {}}}, want: map[string][]types.UID{"a": {"uid-r"}},
		},
		"several resources": {
			rendered: map[string]string{"r": byPods, "q": `{secret: {name: pull}, namespacesWithPods: {annotations: [{matchAnnotations: {x: "a b"}}]}}`},
			pods:     map[string][]pod{"a": {{labels: web}, {annotations: map[string]string{"x": "a b"}}}, "b": {{annotations: map[string]string{"x": "a b"}}}},
			want:     map[string][]types.UID{"a": {"uid-q", "uid-r"}, "b": {"uid-q"}},
		},
		"a namespace rule selects it, too: it is demand all the same": {
			rendered: map[string]string{"r": `{secret: {name: pull}, namespaces: {labels: [{}]}, namespacesWithPods: {labels: [{}]}}`},
			pods:     map[string][]pod{"a": {{}}}, want: map[string][]types.UID{"a": {"uid-r"}},
		},
		"an excluded namespace is never demanded": {
			rendered: map[string]string{"r": byPods}, pods: map[string][]pod{"kube-system": {{labels: web}}}, want: map[string][]types.UID{},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, a *testAgent) {
				for name, target := range test.rendered {
					a.serves(rendered(t, name, 0, target, 1))
				}
				for namespace, pods := range test.pods {
					for i := range pods {
						a.pod(namespace, string(rune('a'+i)), &pods[i])
					}
				}
				report := a.currentReport()
				first, err := report.Encode() // sorts
				require.NoError(t, err)
				require.Equal(t, impsync.Report{Node: "n1", FormatVersions: impsync.FormatVersions(), Demand: test.want}, report)
				for range 10 {
					again, err := a.currentReport().Encode()
					require.NoError(t, err)
					require.Equal(t, first, again, "the same Pods give the same bytes")
				}
				decoded, err := impsync.DecodeReport(first)
				require.NoError(t, err)
				require.Equal(t, "n1", decoded.Node)
			})
		})
	}
}

const patch = "PATCH /api/v1/namespaces/imps-system/configmaps/imps-node-n1"

// keeps runs keepReport until the returned function is called.
func keeps(t *testing.T, a *testAgent) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- a.keepReport(ctx, t.Context()) }()
	return func() {
		cancel()
		require.NoError(t, <-done)
	}
}

func TestAReportIsWrittenOnlyWhereItDiffers(t *testing.T) {
	inBubble(t, func(t *testing.T, a *testAgent) {
		key := types.NamespacedName{Namespace: "imps-system", Name: "imps-node-n1"}
		data, err := a.currentReport().Encode()
		require.NoError(t, err)
		a.report.Put(key, data[impsync.ReportKey])
		wrote, err := a.writeReport(t.Context())
		require.NoError(t, err)
		require.False(t, wrote)
		require.Empty(t, a.server.asked())

		for _, there := range []string{"", "x", data[impsync.ReportKey] + " "} {
			a.report.Put(key, there)
			wrote, err = a.writeReport(t.Context())
			require.True(t, wrote)
			require.Error(t, err)
			require.Equal(t, []string{patch}, a.server.asked())
		}
	})
}

func TestAReportIsSilentWhereNothingChanges(t *testing.T) {
	inBubble(t, func(t *testing.T, a *testAgent) {
		data, err := a.currentReport().Encode()
		require.NoError(t, err)
		a.report.Put(types.NamespacedName{Namespace: "imps-system", Name: "imps-node-n1"}, data[impsync.ReportKey])
		stop := keeps(t, a)
		for range 100 {
			a.dirty()
			<-time.After(time.Second)
		}
		stop()
		require.Empty(t, a.server.asked())
		require.Empty(t, a.log.String())
	})
}

func TestAReportThatCannotBeWrittenIsTriedAgainEverMoreSeldom(t *testing.T) {
	inBubble(t, func(t *testing.T, a *testAgent) {
		stop := keeps(t, a)
		<-time.After(time.Hour)
		require.Empty(t, a.server.asked(), "nothing has happened")
		for range 5 {
			a.dirty() // many changes are one write
		}
		synctest.Wait()
		require.Len(t, a.server.asked(), 1)
		for i, wait := 0, 2*time.Second; i < 8; i, wait = i+1, min(2*wait, reportLongest) {
			<-time.After(wait - 1)
			synctest.Wait()
			require.Empty(t, a.server.asked())
			a.dirty() // hastens nothing
			<-time.After(1)
			synctest.Wait()
			require.Equal(t, []string{patch}, a.server.asked())
		}
		start := time.Now()
		stop()
		require.Equal(t, start, time.Now(), "it ends at once")
		require.Equal(t, 9, strings.Count(a.log.String(), "cannot write the node report"))
	})
}

func TestARetryOfTheReportStopsWhereItIsRightByThen(t *testing.T) {
	inBubble(t, func(t *testing.T, a *testAgent) {
		stop := keeps(t, a)
		defer stop()
		a.dirty()
		synctest.Wait()
		require.Len(t, a.server.asked(), 1)
		data, err := a.currentReport().Encode()
		require.NoError(t, err)
		a.report.Put(types.NamespacedName{Namespace: "imps-system", Name: "imps-node-n1"}, data[impsync.ReportKey])
		<-time.After(time.Hour)
		require.Empty(t, a.server.asked(), "the write had arrived, only its answer had not")
	})
}

// An agent that is rolled back must not withdraw demand only since it cannot read why.
func TestOfWhatItCannotReadTheDemandStaysThatWasReportedLast(t *testing.T) {
	inBubble(t, func(t *testing.T, a *testAgent) {
		last, err := impsync.Report{Node: "n1", Demand: map[string][]types.UID{
			"a": {"uid-new", "uid-r"}, "b": {"uid-new"}, "empty": {"uid-new"}, "c": {"uid-dead"},
		}}.Encode()
		require.NoError(t, err)
		a.report.Put(types.NamespacedName{Namespace: "imps-system", Name: "imps-node-n1"}, last[impsync.ReportKey])
		a.serves(rendered(t, "r", 0, byPods, 1))
		key := types.NamespacedName{Namespace: "imps-rendered", Name: "imps-rendered-uid-new"}
		unreadable := renderedSecret{err: impsync.ErrFormatVersion}
		a.rendered.Put(key, unreadable)
		a.renderedChanged(key, nil, &unreadable)
		for _, namespace := range []string{"a", "b", "c"} {
			a.pod(namespace, "x", &pod{})
		}
		require.Equal(t, map[string][]types.UID{"a": {"uid-new"}, "b": {"uid-new"}}, a.currentReport().Demand)

		unreadable.deleting = true
		a.rendered.Put(key, unreadable)
		require.Empty(t, a.currentReport().Demand)
	})
}

// What a resource with rescue could help with is reported, and nothing else.
func TestStuckPodsInTheReport(t *testing.T) {
	t.Parallel()
	const rescuing = `{secret: {name: pull}, namespaces: {names: [n]}, rescue: true}`
	refused := []string{"r.io/app"}
	tests := map[string]struct {
		target string
		pod    pod
		in     string
		want   bool
	}{
		"it cannot pull, and does not name the Secret": {pod: pod{refused: refused}, want: true},
		"it names another Secret":                      {pod: pod{refused: refused, pullSecrets: []string{"theirs"}}, want: true},
		"one of two images is of a registry that the Secret has": {
			pod: pod{refused: []string{"other.io/app", "r.io/app"}}, want: true,
		},
		"it names the Secret: the kubelet tries again with it": {pod: pod{refused: refused, pullSecrets: []string{"theirs", "pull"}}},
		"nothing of it fails":                {pod: pod{waiting: true}},
		"the image is of another registry":   {pod: pod{refused: []string{"other.io/app"}}},
		"the image is none":                  {pod: pod{refused: []string{"r.io/UPPER"}}},
		"the namespace is excluded":          {pod: pod{refused: refused}, in: "kube-system"},
		"the resource does not ask for that": {target: everywhere, pod: pod{refused: refused}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			a := newTestAgent(t)
			target, namespace := cmp.Or(test.target, rescuing), cmp.Or(test.in, "n")
			a.serves(rendered(t, "r", 0, target, 1))
			test.pod.uid = "uid-of-pod"
			a.pod(namespace, "p", &test.pod)
			var want []impsync.StuckPod
			if test.want {
				want = []impsync.StuckPod{{Namespace: namespace, Name: "p", UID: "uid-of-pod"}}
			}
			require.Equal(t, want, a.currentReport().Stuck)
		})
	}
}

func TestTheReportFollowsWhatIsStuck(t *testing.T) {
	t.Parallel()
	a := newTestAgent(t)
	rescuing := rendered(t, "r", 0, `{secret: {name: pull}, namespaces: {names: [n]}, rescue: true}`, 1)
	a.serves(rescuing)
	stuck, waits := pod{refused: []string{"r.io/app"}, waiting: true}, pod{waiting: true}
	a.pod("n", "p", &waits)
	a.isDirty()
	a.pod("n", "p", &stuck)
	require.True(t, a.isDirty(), "it cannot pull")
	a.pod("n", "p", &stuck)
	require.False(t, a.isDirty(), "nor the next time")
	a.pod("n", "p", &waits)
	require.True(t, a.isDirty(), "it can")

	a.pod("n", "p", &stuck)
	a.isDirty()
	without := rescuing
	without.Rescue = false
	a.serves(without)
	require.True(t, a.isDirty(), "the resource does not ask for it any more")
	require.Empty(t, a.currentReport().Stuck)
	a.serves(rescuing)
	require.True(t, a.isDirty(), "it asks for it again")
	require.NotEmpty(t, a.currentReport().Stuck)
	a.serves(rescuing)
	require.True(t, a.isDirty(), "a rotation may bring another registry")
}

func TestWhatIsKeptOfAPodThatCannotPull(t *testing.T) {
	t.Parallel()
	waiting := func(name, reason string) corev1.ContainerStatus {
		return corev1.ContainerStatus{Name: name, Image: "what the runtime calls it", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: "401 Unauthorized"}}}
	}
	p := &corev1.Pod{
		Spec: corev1.PodSpec{
			ImagePullSecrets: []corev1.LocalObjectReference{{Name: "b"}, {Name: "a"}},
			InitContainers:   []corev1.Container{{Name: "init", Image: "z.io/init"}},
			Containers:       []corev1.Container{{Name: "one", Image: "r.io/one"}, {Name: "two", Image: "r.io/two"}, {Name: "three", Image: "r.io/three"}},
		},
		Status: corev1.PodStatus{
			InitContainerStatuses: []corev1.ContainerStatus{waiting("init", "ErrImagePull")},
			ContainerStatuses: []corev1.ContainerStatus{
				waiting("three", "PodInitializing"), waiting("two", "ImagePullBackOff"), waiting("one", "ErrImageNeverPull"),
			},
		},
	}
	kept := convertPod(p)
	require.Equal(t, []string{"r.io/two", "z.io/init"}, kept.refused)
	require.Equal(t, []string{"b", "a"}, kept.pullSecrets)
	p.DeletionTimestamp = &metav1.Time{Time: time.Now()}
	require.Empty(t, convertPod(p).refused, "it goes")
}
