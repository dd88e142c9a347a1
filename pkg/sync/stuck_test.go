package sync

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The messages are those of kubelets with containerd and CRI-O.
func TestWhatARegistryHasSaid(t *testing.T) {
	t.Parallel()
	for message, want := range map[string]PullFailure{
		`failed to resolve reference "r.one/app:1": pull access denied, repository does not exist or may require authorization: server message: insufficient_scope: authorization failed`: PullRefused,
		`unexpected status from HEAD request to https://r.one/v2/app/manifests/1: 401 Unauthorized`:                                                                                       PullRefused,
		`failed to authorize: failed to fetch anonymous token: unexpected status from GET request to https://r.one/token: 403 Forbidden`:                                                  PullRefused,
		`reading manifest 1 in r.one/app: unauthorized: authentication required`:                                                                                                          PullRefused,
		`no basic auth credentials`: PullRefused,
		`rpc error: code = NotFound desc = failed to pull and unpack image "r.one/app:1": failed to resolve reference "r.one/app:1": r.one/app:1: not found`: PullNotFound,
		`reading manifest 1 in r.one/app: manifest unknown`:                                                                                 PullNotFound,
		`dial tcp: lookup r.one on 10.0.0.10:53: no such host`:                                                                              PullUnreachable,
		`dial tcp 192.0.2.1:443: i/o timeout`:                                                                                               PullUnreachable,
		`dial tcp 192.0.2.1:443: connect: connection refused`:                                                                               PullUnreachable,
		`tls: failed to verify certificate: x509: certificate signed by unknown authority`:                                                  PullUnreachable,
		`unexpected status from HEAD request to https://r.one/v2/app/manifests/1: 503 Service Unavailable`:                                  PullUnreachable,
		`unexpected status from HEAD request to https://r.one/v2/app/manifests/1: 429 Too Many Requests: toomanyrequests: You have reached`: PullOther,
		`failed to extract layer: no space left on device`:                                                                                  PullOther,
		`Back-off pulling image "r.one/denied"`:                                                                                             PullOther,
		``:                                                                                                                                  PullOther,
	} {
		require.Equal(t, want, PullFailureOf("r.one/denied", message), message)
	}
}

func TestPodsThatCameTooEarly(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	pod := func(after time.Duration) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{CreationTimestamp: metav1.NewTime(noon.Add(after))}}
	}
	account := func(at string) *corev1.ServiceAccount {
		return &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{AnnotationAttachedAt: at}}}
	}
	require.True(t, CameTooEarly(pod(-time.Hour), account("2026-03-01T12:00:00Z")))
	require.True(t, CameTooEarly(pod(clockSkew), account("2026-03-01T12:00:00Z")), "clocks differ")
	require.False(t, CameTooEarly(pod(clockSkew+time.Second), account("2026-03-01T12:00:00Z")))
	require.True(t, CameTooEarly(pod(0), account("")), "nobody knows")
	require.True(t, CameTooEarly(pod(0), account("yesterday")), "nobody knows")
}

func TestTheAnnotationIsReadWhateverSomebodyHasWrittenIntoIt(t *testing.T) {
	t.Parallel()
	for value, want := range map[string][]string{
		"": nil, "pull": {"pull"}, "a,b": {"a", "b"}, " a , ,b,a,": {"a", "b"}, ",": nil, "a b": {"a b"},
	} {
		require.Equal(t, want, Attached(&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{AnnotationAttached: value}}}), value)
	}
}
