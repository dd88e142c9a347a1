package node

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/yaml"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

func TestMain(m *testing.M) {
	// The second of them limits the rate of errors by one clock for the whole process, which
	// the bubbles of synctest must not share.
	utilruntime.ErrorHandlers = utilruntime.ErrorHandlers[:1]
	goleak.VerifyTestMain(m)
}

// canary stands for a credential. No test may find it where things are printed.
const canary = "canary-8c31f7-never-printed"

// noServer is a connection to an API server that is not there.
type noServer struct {
	mu       sync.Mutex
	requests []string
	// answer answers all the same, where it is set.
	answer func(*http.Request) (*http.Response, error)
}

func (n *noServer) RoundTrip(request *http.Request) (*http.Response, error) {
	if n.answer != nil {
		return n.answer(request)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.requests = append(n.requests, request.Method+" "+request.URL.Path)
	return nil, fmt.Errorf("dial: %w", syscall.ECONNREFUSED)
}

// asked returns the requests since the last call.
func (n *noServer) asked() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	requests := n.requests
	n.requests = nil
	return requests
}

// testAgent is an Agent in which nothing runs.
type testAgent struct {
	*Agent
	server *noServer
	// watched are the namespaces whose watch was started and not stopped.
	watched map[string]bool
	log     *bytes.Buffer
}

func newTestAgent(t *testing.T) *testAgent {
	t.Helper()
	a := &testAgent{server: &noServer{}, watched: map[string]bool{}, log: &bytes.Buffer{}}
	registry := prometheus.NewRegistry()
	agent, err := New(Config{
		NodeName: "n1", Namespace: "imps-system", RenderedNamespace: "imps-rendered", Excluded: impsync.Exclusion{"kube-*"},
		Client: &rest.Config{Host: "http://api.invalid", QPS: -1, Transport: a.server}, Metrics: impsync.NewMetrics(registry), Registry: registry,
		Log: slog.New(slog.NewTextHandler(a.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	require.NoError(t, err)
	a.Agent = agent
	a.queue = workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](50*time.Millisecond, time.Minute))
	t.Cleanup(a.queue.ShutDown)
	a.watchNamespace = func(name string, _ *namespace) context.CancelFunc {
		require.False(t, a.watched[name], "one watch for each namespace")
		a.watched[name] = true
		return func() { delete(a.watched, name) }
	}
	return a
}

// queued takes what is ready out of the queue, sorted.
func (a *testAgent) queued() []string {
	var names []string
	for a.queue.Len() > 0 {
		name, _ := a.queue.Get()
		a.queue.Done(name)
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// isDirty reports whether the report may need a write, and forgets it.
func (a *testAgent) isDirty() bool {
	select {
	case <-a.reportDirty:
		return true
	default:
		return false
	}
}

// pod has the agent see a Pod, or a change of it; nil is its end.
func (a *testAgent) pod(namespace, name string, current *pod) {
	key := types.NamespacedName{Namespace: namespace, Name: name}
	var old *pod
	if was, ok := a.pods.Get(key); ok {
		old = &was
	}
	if current == nil {
		a.pods.Drop(key, func(pod) bool { return true })
	} else {
		a.pods.Put(key, *current)
	}
	a.podChanged(key, old, current)
}

// known has the agent know the metadata of a namespace with Pods.
func (a *testAgent) known(name string, labels map[string]string) {
	a.namespaceRead(context.Background(), name, a.namespaces[name], &namespaceMeta{labels: labels})
}

// rendered returns the rendered form of a resource that was created so many minutes after
// noon of some day, with a spec.target as YAML. Its UID is "uid-" and its name.
func rendered(t *testing.T, name string, minutes int, target string, counter uint64) impsync.Rendered {
	t.Helper()
	var spec v1alpha1.TargetSpec
	require.NoError(t, yaml.UnmarshalStrict([]byte(target), &spec))
	ref := impsync.ResourceRef{
		Name: name, UID: types.UID("uid-" + name),
		CreationTimestamp: metav1.NewTime(time.Date(2026, 3, 1, 12, minutes, 0, 0, time.UTC)),
	}
	secret, err := impsync.NewTarget(ref, spec.Secret, counter, dockerconfig.NewSensitive(`{"auths":{"r.io":{"password":"`+canary+`"}}}`))
	require.NoError(t, err)
	return impsync.Rendered{FormatVersion: 1, Resource: ref, Namespaces: spec.Namespaces, Pods: spec.NamespacesWithPods, Rescue: spec.Rescue, Kubelet: spec.KubeletScope(), Target: secret}
}

// serves has the agent see a rendered Secret.
func (a *testAgent) serves(r impsync.Rendered) {
	a.renderedChanged(types.NamespacedName{Name: impsync.RenderedName(r.Resource.UID)}, nil, &renderedSecret{rendered: r})
}
