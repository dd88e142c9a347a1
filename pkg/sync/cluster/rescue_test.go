package cluster

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	impsync "github.com/imps-node/imps/pkg/sync"
)

// cannotPull is a Pod that cannot pull these images, and names these Secrets.
func cannotPull(created time.Time, pullSecrets []string, images ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "n", UID: "uid-of-pod", CreationTimestamp: metav1.NewTime(created)}}
	for _, name := range pullSecrets {
		p.Spec.ImagePullSecrets = append(p.Spec.ImagePullSecrets, corev1.LocalObjectReference{Name: name})
	}
	for _, image := range images {
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: image, Image: image})
		p.Status.ContainerStatuses = append(p.Status.ContainerStatuses, corev1.ContainerStatus{
			Name: image, State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff"}},
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

func TestReplacementHelps(t *testing.T) {
	t.Parallel()
	early, late := noon, noon.Add(time.Minute)
	const registry = "r.io/app"
	edited := accountSince(late, "pull")
	edited.Annotations[impsync.AnnotationAttachedAt] = "yesterday"
	tests := map[string]struct {
		pod     *corev1.Pod
		account *corev1.ServiceAccount
		targets []string
		want    helps
	}{
		"it came before its ServiceAccount named the Secret": {pod: cannotPull(early, nil, registry), want: atOnce},
		"it came so close that clocks cannot tell":           {pod: cannotPull(late.Add(time.Minute), nil, registry), want: atOnce},
		"it came later, and does not name it all the same":   {pod: cannotPull(late.Add(time.Minute+time.Second), nil, registry), want: never},
		"it names the Secret: its back-off ends well":        {pod: cannotPull(early, []string{"pull"}, registry), want: notYet},
		"its ServiceAccount does not name the Secret":        {pod: cannotPull(early, nil, registry), account: accountSince(late, "theirs"), want: notYet},
		"it has what its ServiceAccount named before": {
			pod: cannotPull(early, []string{"theirs"}, registry), account: accountSince(late, "theirs", "pull"), want: atOnce,
		},
		"it has pull Secrets of its own": {
			pod: cannotPull(early, []string{"own"}, registry), account: accountSince(late, "theirs", "pull"), want: never,
		},
		"it does not wait any more":      {pod: cannotPull(early, nil), want: notYet},
		"another image would still fail": {pod: cannotPull(early, nil, registry, "other.io/app"), want: notYet},
		"both images are in the Secret":  {pod: cannotPull(early, nil, registry, "r.io/b"), want: atOnce},
		"the Secret is not there":        {pod: cannotPull(early, nil, registry), targets: []string{}, want: notYet},
		"the resource that holds it does not ask for rescue": {
			pod: cannotPull(early, nil, registry), targets: []string{`{secret: {name: pull}}`}, want: notYet,
		},
		"another resource has it as well, whose Secret the Pod names": {
			pod: cannotPull(early, []string{"theirs"}, registry), account: accountSince(late, "theirs", "pull"),
			targets: []string{`{secret: {name: pull}, rescue: true}`, `{secret: {name: theirs}, rescue: true}`}, want: notYet,
		},
		"nobody knows since when the ServiceAccount names it": {
			pod: cannotPull(early, nil, registry), account: &corev1.ServiceAccount{ImagePullSecrets: []corev1.LocalObjectReference{{Name: "pull"}}}, want: never,
		},
		"somebody has edited the time": {pod: cannotPull(early, nil, registry), account: edited, want: never},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			account := test.account
			if account == nil {
				account = accountSince(late, "pull")
			}
			if test.targets == nil {
				test.targets = []string{`{secret: {name: pull}, rescue: true}`}
			}
			var delivered []impsync.Rendered
			for _, target := range test.targets {
				delivered = append(delivered, renderedAt(t, resource(t, "r", 0, target), 1))
			}
			got, secret := replacementHelps(test.pod, account, delivered)
			require.Equal(t, test.want, got)
			if got == atOnce {
				require.Equal(t, "pull", secret)
			}
		})
	}
}

func TestWhoReplacesAPod(t *testing.T) {
	t.Parallel()
	yes := true
	owned := func(kind string, controller *bool) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{OwnerReferences: []metav1.OwnerReference{{Kind: kind, Name: "x", Controller: controller}}}}
	}
	require.Equal(t, "x", replacer(owned("ReplicaSet", &yes)).Name)
	require.Nil(t, replacer(owned("ReplicaSet", nil)), "not its controller")
	require.Nil(t, replacer(&corev1.Pod{}), "a bare Pod")
	require.Nil(t, replacer(owned("Node", &yes)), "a static Pod: the kubelet's own")
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
