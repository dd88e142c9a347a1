package integration

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/test/cluster/cluster"
)

// The control plane goes away in the middle of a rotation. What was written is not written
// again, and the rest is when it is back.
func TestARotationSurvivesTheControlPlane(t *testing.T) {
	for name, fault := range map[string]struct {
		begin, end func() error
		lasts      time.Duration
	}{
		"whose API server is killed and started again": {
			begin: func() error { return control.StopAPIServer() },
			end:   func() error { return control.StartAPIServer(t.Context()) },
		},
		// Longer than a request of imps waits, and than a Lease can go without being renewed.
		"whose etcd hangs for a quarter of a minute": {
			begin: func() error { return control.Signal(cluster.Etcd, syscall.SIGSTOP) },
			end:   func() error { return control.Signal(cluster.Etcd, syscall.SIGCONT) },
			lasts: 15 * time.Second,
		},
		"whose etcd is stopped for a minute": {
			begin: func() error { return control.StopEtcd() },
			end:   func() error { return control.StartEtcd(t.Context()) },
			lasts: time.Minute,
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSystemBehindProxy(t)
			s.patience = 2 * patient // after a minute of failures the backoff may be at its longest
			s.source("hub", dockerConfig("registry.one"))
			s.coordinator()
			s.agent("node-a")
			const many = 100
			var namespaces []string
			for range many {
				namespaces = append(namespaces, s.namespace(map[string]string{s.prefix: "a"}, nil))
			}
			s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`+"\n"+podRules(s.prefix)))
			s.ready(s.prefix, many)
			uids := map[string]types.UID{}
			for _, namespace := range namespaces {
				uids[namespace] = s.secret(namespace, secretName).UID
			}
			mark := s.control.Audit().Mark()
			// So slow that there is a middle.
			slow := s.proxy.Inject(cluster.Fault{Latency: 500 * time.Millisecond, Match: func(r cluster.Request) bool {
				return r.Resource == "secrets" && r.Name == secretName && r.Verb == "patch"
			}})
			s.source("hub", dockerConfig("registry.two"))
			s.eventually(func() error {
				if n := slow.Hits(); n <= 32 { // so many are written at once
					return fmt.Errorf("%d", n)
				}
				return nil
			}, "the rotation does not begin")
			require.NoError(t, fault.begin())
			written := len(s.secretWrites(mark, "coordinator"))
			require.Positive(t, written)
			require.Less(t, written, many, "it is in the middle")
			slow.Remove()
			pass(t, fault.lasts)
			require.NoError(t, fault.end())

			for namespace, uid := range uids {
				require.Equal(t, uid, s.has(namespace, "registry.two").UID)
			}
			s.ready(s.prefix, many)
			byPods := s.namespace(nil, nil)
			s.pod(byPods, "node-a", map[string]string{s.prefix: "a"}, nil)
			s.has(byPods, "registry.two")
			s.ready(s.prefix, many+1)
			s.calm()
			// A write that was done and not answered is not in the audit log.
			writes := map[string]int{}
			for _, e := range s.secretWrites(mark, "coordinator") {
				writes[e.Namespace]++
			}
			for namespace, n := range writes {
				require.Equal(t, 1, n, namespace)
			}
			require.Greater(t, len(writes), many/2)
		})
	}
}

// pass lets some time pass.
func pass(t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case <-time.After(d):
	case <-t.Context().Done():
	}
}

// An etcd that is full refuses every write, that of the Lease too, so that nobody leads.
// Once there is room again, everything goes on.
func TestAFullEtcdIsWaitedFor(t *testing.T) {
	full := cluster.Start(t, cluster.WithEtcdQuota(24<<20))
	require.NoError(t, install(t.Context(), full))
	s := newSystemOn(t, full)
	s.patience = patient
	s.source("hub", dockerConfig("registry.one"))
	c := s.coordinator()
	s.agent("node-a")
	deleted, untouched := s.namespace(map[string]string{s.prefix: "a"}, nil), s.namespace(map[string]string{s.prefix: "a"}, nil)
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`+"\n"+podRules(s.prefix)))
	s.has(deleted, "registry.one")
	was := s.has(untouched, "registry.one")
	s.ready(s.prefix, 2)

	maps := s.core.CoreV1().ConfigMaps("default")
	_, err := maps.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "growing"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	for n := 0; err == nil; n++ {
		require.Less(t, n, 1000)
		patch := fmt.Sprintf(`{"data":{"key":%q}}`, strings.Repeat(strconv.Itoa(n%10), 512<<10))
		_, err = maps.Patch(t.Context(), "growing", types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	}
	require.ErrorContains(t, err, "database space exceeded")
	mark := full.Audit().Mark()
	require.NoError(t, s.core.CoreV1().Secrets(deleted).Delete(t.Context(), secretName, metav1.DeleteOptions{}))
	s.eventually(func() error {
		if s.tries(mark, "coordinator", deleted) == 0 {
			return fmt.Errorf("no try")
		}
		return nil
	}, "the coordinator does not try to put it back")
	s.eventually(func() error {
		if c.ready() == nil {
			return fmt.Errorf("it leads")
		}
		return nil
	}, "a leader that cannot renew its Lease goes on leading")
	require.Nil(t, s.secret(deleted, secretName))

	require.NoError(t, full.FreeEtcd(t.Context()))
	s.has(deleted, "registry.one")
	s.ready(s.prefix, 2)
	s.source("hub", dockerConfig("registry.two"))
	for _, namespace := range []string{deleted, untouched} {
		s.has(namespace, "registry.two")
	}
	s.ready(s.prefix, 2)
	require.Equal(t, was.UID, s.secret(untouched, secretName).UID)
	s.calm()
	require.Len(t, s.secretWrites(mark, "coordinator"), 3, "one put back, two changed")
}
