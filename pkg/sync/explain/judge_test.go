package explain

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A cluster without imps is told so, where a pull has failed.
func TestAClusterWithoutImps(t *testing.T) {
	t.Parallel()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "p"},
		Spec: corev1.PodSpec{
			NodeName:       "n1",
			InitContainers: []corev1.Container{{Name: "init", Image: "r.one/init"}}, Containers: []corev1.Container{{Name: "app", Image: "r.one/app"}},
			EphemeralContainers: []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "debug", Image: "busybox"}}},
		},
		Status: corev1.PodStatus{InitContainerStatuses: []corev1.ContainerStatus{{
			Name: "init", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ErrImagePull", Message: "401 Unauthorized"}},
		}}},
	}
	got := (&facts{pod: pod, unknown: []string{}}).explain(nil, time.Now())
	require.Len(t, got.Containers, 3)
	require.Equal(t, []Cause{CauseNotInstalled, CauseWaiting, CauseWaiting}, []Cause{got.Containers[0].Cause, got.Containers[1].Cause, got.Containers[2].Cause})
	require.Equal(t, "401 Unauthorized", got.Containers[0].Error, "where no Event tells more")
	require.Equal(t, "docker.io/library/busybox", got.Containers[2].Repository)

	now := metav1.Now()
	pod.DeletionTimestamp = &now
	require.Equal(t, CauseFinished, (&facts{pod: pod}).explain(nil, time.Now()).Containers[0].Cause)
	pod.DeletionTimestamp, pod.Status.Phase = nil, corev1.PodFailed
	require.Equal(t, CauseFinished, (&facts{pod: pod}).explain(nil, time.Now()).Containers[0].Cause)
}

// Of several Events about pulls that which tells of the image counts, and of these the last.
func TestTheKubeletsLastErrorAboutAnImage(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	j := &judge{facts: &facts{failures: []failure{
		{`Failed to pull image "r.one/app": b`, noon.Add(time.Minute)}, {"Error: ErrImagePull", noon}, {`Failed to pull image "r.one/app": a`, noon}, {`Failed to pull image "r.one/app2": c`, noon},
	}}}
	require.Equal(t, `Failed to pull image "r.one/app": b`, j.lastFailure("r.one/app").message)
	require.Equal(t, `Failed to pull image "r.one/app2": c`, j.lastFailure("r.one/app2").message)
	require.Nil(t, j.lastFailure("r.one/ap"))
}
