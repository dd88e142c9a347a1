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
	for name, fault := range map[string]func(t *testing.T){
		"whose API server is killed and started again": func(t *testing.T) {
			require.NoError(t, control.StopAPIServer())
			require.NoError(t, control.StartAPIServer(t.Context()))
		},
		// Longer than a request of imps waits, and than a Lease can go without being renewed.
		"whose etcd hangs for a quarter of a minute": func(t *testing.T) {
			require.NoError(t, control.Signal(cluster.Etcd, syscall.SIGSTOP))
			pass(t, 15*time.Second)
			require.NoError(t, control.Signal(cluster.Etcd, syscall.SIGCONT))
		},
		"whose etcd is stopped for a minute": func(t *testing.T) {
			require.NoError(t, control.StopEtcd())
			pass(t, time.Minute)
			require.NoError(t, control.StartEtcd(t.Context()))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSystem(t)
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
			s.source("hub", dockerConfig("registry.two"))
			s.eventually(func() error {
				if len(s.secretWrites(mark, "coordinator")) == 0 {
					return fmt.Errorf("no write yet")
				}
				return nil
			}, "the rotation does not begin")
			fault(t)
			require.Less(t, len(s.secretWrites(mark, "coordinator")), many, "it was not in the middle")

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
	require.Len(t, s.secretWrites(mark, "coordinator"), 3, "one put back, two changed")
}
