package cluster

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	impsync "github.com/imps-node/imps/pkg/sync"
)

// cannotPull is a Pod that may not pull these images, and names these Secrets.
func cannotPull(pullSecrets []string, images ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "n", UID: "uid-of-pod"}}
	for _, name := range pullSecrets {
		p.Spec.ImagePullSecrets = append(p.Spec.ImagePullSecrets, corev1.LocalObjectReference{Name: name})
	}
	for _, image := range images {
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: image, Image: image})
		p.Status.ContainerStatuses = append(p.Status.ContainerStatuses, corev1.ContainerStatus{
			Name: image, State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: "401 Unauthorized"}},
		})
	}
	return p
}

// accountSince is a ServiceAccount that names these Secrets since a time.
func accountSince(since time.Time, pullSecrets ...string) *corev1.ServiceAccount {
	a := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default", Annotations: map[string]string{
		impsync.AnnotationAttachedAt: since.Format(time.RFC3339),
	}}}
	for _, name := range pullSecrets {
		a.ImagePullSecrets = append(a.ImagePullSecrets, corev1.LocalObjectReference{Name: name})
	}
	return a
}

func TestWhatTheReplacementOfAPodWouldName(t *testing.T) {
	t.Parallel()
	const image = "r.io/app"
	tests := map[string]struct {
		pod     *corev1.Pod
		account *corev1.ServiceAccount
		targets []string
		want    string
	}{
		"the Secret that it lacks":                           {pod: cannotPull(nil, image), want: "pull"},
		"it names the Secret: its back-off ends well":        {pod: cannotPull([]string{"pull"}, image)},
		"its ServiceAccount does not name the Secret":        {pod: cannotPull(nil, image), account: accountSince(noon, "theirs")},
		"it has what its ServiceAccount named before":        {pod: cannotPull([]string{"theirs"}, image), account: accountSince(noon, "theirs", "pull"), want: "pull"},
		"it does not wait any more":                          {pod: cannotPull(nil)},
		"another image would still be refused":               {pod: cannotPull(nil, image, "other.io/app")},
		"both images are in the Secret":                      {pod: cannotPull(nil, image, "r.io/b"), want: "pull"},
		"the Secret is not there":                            {pod: cannotPull(nil, image), targets: []string{}},
		"the resource that holds it does not ask for rescue": {pod: cannotPull(nil, image), targets: []string{`{secret: {name: pull}}`}},
		"another resource has it as well, whose Secret the Pod names": {
			pod: cannotPull([]string{"theirs"}, image), account: accountSince(noon, "theirs", "pull"),
			targets: []string{`{secret: {name: pull}, rescue: true}`, `{secret: {name: theirs}, rescue: true}`},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			account := test.account
			if account == nil {
				account = accountSince(noon, "pull")
			}
			if test.targets == nil {
				test.targets = []string{`{secret: {name: pull}, rescue: true}`}
			}
			var delivered []impsync.Rendered
			for _, target := range test.targets {
				delivered = append(delivered, renderedAt(t, resource(t, "r", 0, target), 1))
			}
			require.Equal(t, test.want, wouldName(test.pod, account, delivered))
		})
	}
}

func TestWhichBudgetsHoldAPod(t *testing.T) {
	t.Parallel()
	always := policyv1.AlwaysAllow
	type budget = policyv1.PodDisruptionBudget
	tests := map[string]struct {
		change func(*budget)
		runs   bool
		want   bool
	}{
		"it allows one of three, and all are stuck": {change: func(b *budget) { b.Status.CurrentHealthy = 0 }},
		"it allows none":                        {change: func(b *budget) { b.Status.DesiredHealthy = 3 }, want: true},
		"it allows none, but of unhealthy Pods": {change: func(b *budget) { b.Status.DesiredHealthy, b.Spec.UnhealthyPodEvictionPolicy = 3, &always }},
		"it is of other Pods": {change: func(b *budget) {
			b.Status.DesiredHealthy, b.Spec.Selector.MatchLabels = 3, map[string]string{"app": "b"}
		}},
		"it selects nothing":                              {change: func(b *budget) { b.Status.DesiredHealthy, b.Spec.Selector = 3, nil }},
		"it is of all Pods":                               {change: func(b *budget) { b.Status.DesiredHealthy, b.Spec.Selector.MatchLabels = 3, nil }, want: true},
		"its controller has not seen it yet":              {change: func(b *budget) { b.Generation = 2 }, want: true},
		"a container runs, and the others are well":       {change: func(b *budget) { b.Status.CurrentHealthy = 2 }, runs: true},
		"a container runs, and too few others are well":   {change: func(b *budget) { b.Status.CurrentHealthy = 1 }, runs: true, want: true},
		"a container runs, and one may be done without":   {change: func(b *budget) { b.Status.CurrentHealthy, b.Status.DisruptionsAllowed = 1, 1 }, runs: true},
		"a container runs, and none is needed or is well": {change: func(b *budget) { b.Status.CurrentHealthy, b.Status.DesiredHealthy = 0, 0 }, runs: true, want: true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			pod := cannotPull(nil, "r.io/app")
			pod.Labels = map[string]string{"app": "a"}
			if test.runs {
				pod.Status.ContainerStatuses = append(pod.Status.ContainerStatuses, corev1.ContainerStatus{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}})
			}
			b := &budget{
				ObjectMeta: metav1.ObjectMeta{Generation: 1},
				Spec:       policyv1.PodDisruptionBudgetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "a"}}},
				Status:     policyv1.PodDisruptionBudgetStatus{ObservedGeneration: 1, ExpectedPods: 3, DesiredHealthy: 2, CurrentHealthy: 2},
			}
			test.change(b)
			require.Equal(t, test.want, holds(b, pod))
		})
	}
}

func TestWhenAPodsTurnComes(t *testing.T) {
	t.Parallel()
	at := func(minutes int) time.Time { return noon.Add(time.Duration(minutes) * time.Minute) }
	last := func(minutes int, uid types.UID) *corev1.Event {
		written := metav1.NewTime(at(minutes))
		return &corev1.Event{
			ObjectMeta:    metav1.ObjectMeta{ManagedFields: []metav1.ManagedFieldsEntry{{Manager: impsync.FieldManager, Time: &written}}},
			LastTimestamp: written, Related: &corev1.ObjectReference{UID: uid},
		}
	}
	again := func(e *corev1.Event) *corev1.Event {
		e.Count = 2
		return e
	}
	tests := map[string]struct {
		last    *corev1.Event
		created int
		want    time.Duration
	}{
		"it was another one's three minutes ago":     {last: last(57, "another"), want: 7 * time.Minute},
		"it was another one's ten minutes ago":       {last: last(50, "another")},
		"it is this one's":                           {last: last(59, "uid-of-pod")},
		"it came after, and is no better off":        {last: last(40, "another"), created: 41, want: rescueInterval},
		"it came in the same second":                 {last: last(40, "another"), created: 40},
		"it came in the same second as the next one": {last: again(last(40, "another")), created: 40, want: rescueInterval},
		"the clock of the leader before was ahead":   {last: last(90, "another"), want: rescueInterval},
		"nobody knows whose it was":                  {last: &corev1.Event{LastTimestamp: metav1.NewTime(at(55))}, want: 5 * time.Minute},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			pod := cannotPull(nil, "r.io/app")
			pod.CreationTimestamp = metav1.NewTime(at(test.created))
			require.Equal(t, test.want, max(0, waitFor(test.last, pod, at(60))))
		})
	}
}

// What a report says of one node says nothing of another, and is forgotten with it.
func TestStuckPodsAreThoseOfTheLastReport(t *testing.T) {
	t.Parallel()
	s := newTestTerm(t)
	queued := func() []string { return drain(s.rescueQueue, stuckPod.String) }
	a, b := impsync.StuckPod{Namespace: "n", Name: "a", UID: "1"}, impsync.StuckPod{Namespace: "n", Name: "b", UID: "2"}
	s.stuckChanged("n1", []impsync.StuckPod{a})
	require.Empty(t, queued(), "unless it is allowed")
	s.config.AllowRescue = true
	s.stuckChanged("n1", []impsync.StuckPod{a})
	require.Equal(t, []string{"n/a"}, queued())
	s.stuckChanged("n1", []impsync.StuckPod{a, b})
	require.Equal(t, []string{"n/b"}, queued(), "what is known is looked at already")
	s.stuckChanged("n2", []impsync.StuckPod{a})
	require.Equal(t, []string{"n/a"}, queued())
	again := a
	again.UID = "3"
	s.stuckChanged("n1", []impsync.StuckPod{again})
	require.Equal(t, []string{"n/a"}, queued(), "another one of its name")
	require.NoError(t, s.rescue(t.Context(), stuckPod{"n1", a}), "it is not reported any more")
	require.Empty(t, s.server().asked())
	require.ErrorIs(t, s.rescue(t.Context(), stuckPod{"n1", again}), errNotYet, "nothing is delivered there")
	require.Empty(t, s.server().asked())
	s.stuckChanged("n1", nil)
	s.stuckChanged("n2", nil)
	require.Empty(t, s.stuck)
	require.Empty(t, queued())
}
