package explain

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// canary stands for a credential. No test may find it where things are printed.
const canary = "canary-8c31f7-never-printed"

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

// The kubelet's status tells of the last pull; Events tell when, or what, where that does not.
func TestTheKubeletsLastErrorAboutAnImage(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	j := &judge{facts: &facts{pod: &corev1.Pod{}, failures: []failure{
		{`Failed to pull image "r.one/app": b`, noon.Add(time.Minute)}, {"Error: ErrImagePull", noon}, {`Failed to pull image "r.one/app": a`, noon}, {`Failed to pull image "r.one/app2": c`, noon},
	}}}
	for name, test := range map[string]struct {
		image, message, want string
		at                   time.Time
		unknown              bool
	}{
		"the status tells, and an Event when":   {image: "r.one/app", message: `Back-off pulling image "r.one/app": ErrImagePull: b`, want: `Failed to pull image "r.one/app": b`, at: noon.Add(time.Minute)},
		"the status tells something newer":      {image: "r.one/app", message: `Back-off pulling image "r.one/app": ErrImagePull: 401 Unauthorized`, want: "401 Unauthorized"},
		"the status of the pull itself":         {image: "r.one/app2", message: "c", want: `Failed to pull image "r.one/app2": c`, at: noon},
		"only Events tell":                      {image: "r.one/app", message: `Back-off pulling image "r.one/app"`, want: `Failed to pull image "r.one/app": b`, at: noon.Add(time.Minute)},
		"nothing tells":                         {image: "r.one/ap", message: `Back-off pulling image "r.one/ap"`, want: `Back-off pulling image "r.one/ap"`, unknown: true},
		"a link in it is cut, and what it asks": {image: "x", message: "GET https://u:p@s3.example/a?X-Amz-Signature=" + canary + "&x: 403", want: "GET https://u:p@s3.example/a?X-Amz-Signature=" + canary + "&x: 403"},
	} {
		t.Run(name, func(t *testing.T) {
			c := Container{Image: test.image}
			j.lastError(&c, test.message)
			require.Equal(t, test.want, c.Error)
			require.Equal(t, test.unknown, c.unknownError)
			if test.at.IsZero() {
				require.Nil(t, c.ErrorTime)
			} else {
				require.Equal(t, test.at, *c.ErrorTime)
			}
		})
	}
}

func TestWhatOthersWroteIsPrintable(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"plain":         "plain",
		"a\x1b[31mb\nc": "a [31mb c",
		"Get \"https://user:" + canary + "@r.one/v2/?x=" + canary + "&y\": 403": `Get "https://r.one/v2/?...": 403`,
		"https://user:" + canary + "@r.one/v2/ 403":                             "https://r.one/v2/ 403",
		strings.Repeat("é", 2000):                                               strings.Repeat("é", 1000) + "...",
	} {
		require.Equal(t, want, printable(text))
	}
}

// Nothing that stands in a Pod, a Secret or a resource gets to a terminal as it is.
func TestNamesOfTenantsArePrintable(t *testing.T) {
	t.Parallel()
	const evil = "a\x1b[2J"
	yes := true
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "p", OwnerReferences: []metav1.OwnerReference{{Kind: "X" + evil, Name: evil, Controller: &yes}}},
		Spec:       corev1.PodSpec{NodeName: "n1", ImagePullSecrets: []corev1.LocalObjectReference{{Name: evil}}, Containers: []corev1.Container{{Name: "app", Image: "r.one/app"}}},
		Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{
			Name: "app", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ErrImagePull", Message: "401 Unauthorized" + evil}},
		}}},
	}
	f := &facts{pod: pod, installed: true, seesAccount: true, seesPods: true, unknown: []string{evil}, secrets: map[string]*secret{evil: nil}}
	raw, err := json.Marshal(f.explain(nil, time.Now()))
	require.NoError(t, err)
	require.NotContains(t, string(raw), `\u001b`)
}
