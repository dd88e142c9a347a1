package integration

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	watchtools "k8s.io/client-go/tools/watch"

	impsync "github.com/imps-node/imps/pkg/sync"
	clusterduty "github.com/imps-node/imps/pkg/sync/cluster"
	nodeduty "github.com/imps-node/imps/pkg/sync/node"
	"github.com/imps-node/imps/test/cluster/cluster"
)

// patient is the deadline of what comes after some attempts that fail: the backoff of a
// watch grows to a minute.
const patient = time.Minute

// newSystemBehindProxy is a system whose duties connect through a proxy.
func newSystemBehindProxy(t *testing.T) *system {
	t.Helper()
	s := newSystem(t)
	s.patience = patient
	var err error
	s.proxy, err = s.control.Proxy(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.proxy.Close()) })
	return s
}

// firstOfEach matches what match does, of requests for the same thing the first.
func firstOfEach(match func(cluster.Request) bool) func(cluster.Request) bool {
	var mu sync.Mutex
	seen := map[string]bool{}
	return func(r cluster.Request) bool {
		if match != nil && !match(r) {
			return false
		}
		query := r.HTTP.URL.Query()
		key := fmt.Sprint(r.UserAgent, r.Verb, r.HTTP.URL.Path, query.Get("fieldSelector"), query.Get("labelSelector"))
		mu.Lock()
		defer mu.Unlock()
		defer func() { seen[key] = true }()
		return !seen[key]
	}
}

// history is what became of the target Secrets of some namespaces, as an observer sees it
// who does not connect through the proxy.
type history struct {
	done   chan struct{}
	mu     sync.Mutex
	events map[string][]watch.EventType
	// last is the counter of each Secret, and back those that went backwards.
	last map[string]uint64
	back []string
}

// observe begins a history of the target Secrets.
func (s *system) observe() *history {
	s.t.Helper()
	secrets := s.core.CoreV1().Secrets("")
	only := metav1.ListOptions{FieldSelector: "metadata.name=" + secretName}
	list, err := secrets.List(s.t.Context(), only)
	require.NoError(s.t, err)
	// It goes on where the API server ends a watch, as it does to a client that it finds slow.
	watcher, err := watchtools.NewRetryWatcherWithContext(ctxOf(s.t), list.ResourceVersion,
		&cache.ListWatch{WatchFuncWithContext: func(ctx context.Context, from metav1.ListOptions) (watch.Interface, error) {
			from.FieldSelector = only.FieldSelector
			return secrets.Watch(ctx, from)
		}})
	require.NoError(s.t, err)
	h := &history{done: make(chan struct{}), events: map[string][]watch.EventType{}, last: map[string]uint64{}}
	go func() {
		defer close(h.done)
		for event := range watcher.ResultChan() {
			if secret, ok := event.Object.(*corev1.Secret); ok {
				h.note(event.Type, secret)
			}
		}
	}()
	s.t.Cleanup(func() {
		watcher.Stop()
		<-h.done
	})
	return h
}

func (h *history) note(event watch.EventType, secret *corev1.Secret) {
	h.mu.Lock()
	defer h.mu.Unlock()
	namespace := secret.Namespace
	h.events[namespace] = append(h.events[namespace], event)
	revision, err := impsync.ParseRevision(secret.Annotations[impsync.AnnotationRevision])
	if err != nil || revision.Counter < h.last[namespace] {
		h.back = append(h.back, fmt.Sprint(namespace, ": ", revision, " after ", h.last[namespace]))
	}
	h.last[namespace] = revision.Counter
}

// is waits until exactly these events were seen of the Secret of each namespace, none of
// which went back to older content.
func (h *history) is(s *system, namespaces []string, want ...watch.EventType) {
	s.t.Helper()
	s.eventually(func() error {
		h.mu.Lock()
		defer h.mu.Unlock()
		require.Empty(s.t, h.back)
		for _, namespace := range namespaces {
			if have := h.events[namespace]; !slices.Equal(have, want) {
				return fmt.Errorf("in namespace %s: %v, not %v", namespace, have, want)
			}
		}
		return nil
	}, "the history of a Secret is another")
}

func failure(code int, reason metav1.StatusReason) *cluster.Status {
	return cluster.Failure(code, reason, "made up by the test")
}

// tooManyRequests is the API server's own answer, of its priority and fairness.
func tooManyRequests(retryAfter string) *cluster.Status {
	return &cluster.Status{
		Code:   http.StatusTooManyRequests,
		Header: http.Header{"Content-Type": {"text/plain"}, "Retry-After": {retryAfter}},
		Body:   []byte("Too many requests, please try again later."),
	}
}

// Whatever happens to the first try of each request, everything is done in the end, once.
func TestFaultsOfSingleRequestsCostNothingButTime(t *testing.T) {
	for name, fault := range map[string]cluster.Fault{
		"the API server fails":                    {Status: failure(http.StatusInternalServerError, metav1.StatusReasonInternalError)},
		"the API server is unavailable":           {Status: failure(http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable)},
		"the API server has too much to do":       {Status: tooManyRequests("1")},
		"the API server takes too long":           {Status: failure(http.StatusGatewayTimeout, metav1.StatusReasonTimeout)},
		"a load balancer answers":                 {Status: &cluster.Status{Code: http.StatusBadGateway, Body: []byte("<html>bad gateway</html>")}},
		"the connection breaks before it is done": {ResetBefore: true},
		"the connection breaks after it is done":  {ResetAfter: true},
		"the answer ends before it has begun":     {Truncate: cluster.AtOnce},
		"the answer ends in the middle":           {Truncate: 30},
		"it takes a third of a second":            {Latency: time.Second / 3},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSystemBehindProxy(t)
			s.source("hub", dockerConfig("registry.one"))
			s.coordinator(func(c *clusterduty.Config) { c.DemandLinger = clusterduty.DefaultDemandLinger })
			s.agent("node-a")
			hits := 0
			during := func(step func()) {
				fault.Match = firstOfEach(func(r cluster.Request) bool {
					return r.Verb != "list" && r.Verb != "watch" && r.Resource != "leases"
				})
				injection := s.proxy.Inject(fault)
				defer injection.Remove()
				step()
				hits += injection.Hits()
			}
			s.doneOnce(during)
			require.Greater(t, hits, 20)
		})
	}
}

// The same from the start on: the first list and watch of each kind, the Lease, a report.
func TestAStartAmongFaultsCostsNothingButTime(t *testing.T) {
	for name, fault := range map[string]cluster.Fault{
		"the API server fails":                   {Status: failure(http.StatusInternalServerError, metav1.StatusReasonInternalError)},
		"the API server has too much to do":      {Status: tooManyRequests("1")},
		"the connection breaks after it is done": {ResetAfter: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSystemBehindProxy(t)
			s.source("hub", dockerConfig("registry.one"))
			var mu sync.Mutex
			hit := map[string]int{} // by verb and resource
			first := firstOfEach(nil)
			fault.Match = func(r cluster.Request) bool {
				if !first(r) {
					return false
				}
				mu.Lock()
				defer mu.Unlock()
				hit[r.Verb+" "+r.Resource]++
				return true
			}
			s.proxy.Inject(fault)
			s.coordinator(func(c *clusterduty.Config) { c.DemandLinger = clusterduty.DefaultDemandLinger })
			s.agent("node-a")
			s.doneOnce(func(step func()) { step() })
			mu.Lock()
			defer mu.Unlock()
			for _, request := range []string{
				"watch imagepullsecrets", "watch namespaces", "watch nodes", "watch pods", "watch configmaps", "watch secrets",
				"get leases", "update leases", "patch secrets", "patch configmaps", "patch imagepullsecrets",
			} {
				require.Contains(t, hit, request)
			}
		})
	}
}

// doneOnce runs everything that imps does, each step with what during does to it, and
// requires that all of it is done, and nothing more than once.
func (s *system) doneOnce(during func(step func())) {
	s.t.Helper()
	mark := s.control.Audit().Mark()
	history := s.observe()
	var byRule []string
	for range 6 {
		byRule = append(byRule, s.namespace(map[string]string{s.prefix: "a"}, nil))
	}
	byPods := s.namespace(nil, nil)
	all := append(slices.Clone(byRule), byPods)
	during(func() {
		s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`+"\n"+podRules(s.prefix)))
		s.pod(byPods, "node-a", map[string]string{s.prefix: "a"}, nil)
		for _, namespace := range all {
			s.has(namespace, "registry.one")
		}
		s.ready(s.prefix, len(all))
	})
	during(func() {
		s.source("hub", dockerConfig("registry.two"))
		for _, namespace := range all {
			s.has(namespace, "registry.two")
		}
		s.ready(s.prefix, len(all))
	})
	gone := byRule[0]
	during(func() {
		s.label(gone, map[string]any{s.prefix: nil})
		s.lacks(gone)
		s.ready(s.prefix, len(all)-1)
	})
	s.calm()
	history.is(s, all[:1], watch.Added, watch.Modified, watch.Deleted)
	history.is(s, all[1:], watch.Added, watch.Modified)
	// Nor was anything written that changed nothing. A write whose client is gone may stand
	// in the audit log as a failure, and in the Pods' namespace node and coordinator may both
	// have tried to create the Secret.
	writes := map[string]int{}
	for _, e := range append(s.secretWrites(mark, "coordinator"), s.secretWrites(mark, "agent/node-a")...) {
		if e.Namespace != byPods {
			writes[fmt.Sprint(e.Verb, " ", e.Code)]++
		}
	}
	for write, most := range map[string]int{"patch 201": len(byRule), "patch 200": len(byRule), "delete 200": 1} {
		require.LessOrEqual(s.t, writes[write], most, write)
		delete(writes, write)
	}
	require.Empty(s.t, writes)
}

// Each watch breaks once, after so many events: in the middle of its first list, at its
// end, or at any change after it.
func TestAWatchThatBreaksAtAnyEventCostsNothingButTime(t *testing.T) {
	for _, events := range []int{0, 1, 2, 3, 5, 8} {
		t.Run(fmt.Sprintf("after %d events", events), func(t *testing.T) {
			s := newSystemBehindProxy(t)
			var broken atomic.Int64
			first := firstOfEach(func(r cluster.Request) bool { return r.Verb == "watch" })
			s.proxy.Inject(cluster.Fault{
				Match: func(r cluster.Request) bool {
					begins := first(r)
					if r.Verb == "watch" && !begins {
						broken.Add(1) // no watch ends by itself that soon
					}
					return begins
				},
				TruncateEvents: cmp.Or(events, cluster.AtOnce),
			})
			s.source("hub", dockerConfig("registry.one"))
			s.coordinator(func(c *clusterduty.Config) { c.DemandLinger = clusterduty.DefaultDemandLinger })
			s.agent("node-a")
			s.doneOnce(func(step func()) { step() })
			require.Greater(t, broken.Load(), int64(1))
		})
	}
}

// A load balancer that goes away takes all connections with it, again and again.
func TestConnectionsThatBreakInTheMiddleOfEverythingCostNothingButTime(t *testing.T) {
	s := newSystemBehindProxy(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator(func(c *clusterduty.Config) { c.DemandLinger = clusterduty.DefaultDemandLinger })
	s.agent("node-a")
	passed := []int64{2, 2, 0} // writes of target Secrets that each step makes before
	s.doneOnce(func(step func()) {
		var left atomic.Int64
		left.Store(passed[0])
		passed = passed[1:]
		held := s.proxy.Inject(cluster.Fault{Times: 1, Hold: true, Match: func(r cluster.Request) bool {
			return (r.Verb == "patch" || r.Verb == "delete") && r.Name == secretName && left.Add(-1) < 0
		}})
		defer held.Remove()
		broken := make(chan struct{})
		go func() {
			defer close(broken)
			select {
			case <-held.Held():
				s.proxy.BreakAll()
			case <-t.Context().Done():
			}
		}()
		step()
		<-broken
	})
}

// What is asked for with Retry-After is heeded, also where it is longer than one request
// may take: no second try comes earlier.
func TestRetryAfterIsHonoured(t *testing.T) {
	const seconds = 12
	s := newSystemBehindProxy(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a")
	leaving, edited := s.namespace(map[string]string{s.prefix: "a"}, nil), s.namespace(map[string]string{s.prefix: "a"}, nil)
	created, byAgent := s.namespace(nil, nil), s.namespace(nil, nil)
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`+"\n"+podRules(s.prefix)))
	s.has(leaving, "registry.one")
	s.has(edited, "registry.one")
	s.ready(s.prefix, 2)

	tries := map[string][]time.Time{}
	var mu sync.Mutex
	refused := firstOfEach(nil)
	injection := s.proxy.Inject(cluster.Fault{Status: tooManyRequests(strconv.Itoa(seconds)), Match: func(r cluster.Request) bool {
		if r.Verb != "patch" && r.Verb != "delete" || r.Resource != "secrets" || r.Name != secretName {
			return false
		}
		mu.Lock()
		defer mu.Unlock()
		key := r.UserAgent + ": " + r.Verb + " in " + r.Namespace
		tries[key] = append(tries[key], time.Now())
		return refused(r)
	}})
	s.label(leaving, map[string]any{s.prefix: nil})
	s.label(created, map[string]any{s.prefix: "a"})
	_, err := s.core.CoreV1().Secrets(edited).Patch(t.Context(), secretName, types.MergePatchType,
		[]byte(`{"data":{".dockerconfigjson":"e30="}}`), metav1.PatchOptions{FieldManager: "a-user"})
	require.NoError(t, err)
	s.pod(byAgent, "node-a", nil, nil) // which no rule selects yet
	s.label(byAgent, map[string]any{s.prefix: "a"})
	s.lacks(leaving)
	for _, namespace := range []string{created, edited, byAgent} {
		s.has(namespace, "registry.one")
	}
	s.ready(s.prefix, 3)
	injection.Remove()
	mu.Lock()
	defer mu.Unlock()
	// Of two duties that were both refused, one finds the Secret there.
	require.Len(t, tries, 5)
	again := 0
	for key, times := range tries {
		if len(times) > 1 {
			again++
			require.GreaterOrEqual(t, times[1].Sub(times[0]), seconds*time.Second, key)
		}
	}
	require.GreaterOrEqual(t, again, 4)
	s.calm()
}

// A write that goes on failing is tried again ever more seldom.
func TestWhatFailsIsNotRetriedHot(t *testing.T) {
	// As the API server says it: with details, but without Retry-After in them.
	status := apierrors.NewServerTimeout(impsync.SecretResource.GroupResource(), "patch", 0).ErrStatus
	status.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}
	timeout, err := json.Marshal(status)
	require.NoError(t, err)
	for name, fault := range map[string]cluster.Fault{
		"the API server fails": {Status: failure(http.StatusInternalServerError, metav1.StatusReasonInternalError)},
		"it takes too long, and does not say when it will not": {
			Status: &cluster.Status{Code: http.StatusInternalServerError, Header: http.Header{"Content-Type": {"application/json"}}, Body: timeout},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSystemBehindProxy(t)
			s.source("hub", dockerConfig("registry.one"))
			s.coordinator()
			const failures = 4
			var mu sync.Mutex
			var tries []time.Time
			fault.Match = func(r cluster.Request) bool {
				if r.Verb != "patch" || r.Resource != "secrets" || r.Name != secretName {
					return false
				}
				mu.Lock()
				defer mu.Unlock()
				tries = append(tries, time.Now())
				return len(tries) <= failures
			}
			injection := s.proxy.Inject(fault)
			namespace := s.namespace(nil, nil)
			s.resource(s.prefix, spec(`  namespaces: {names: [`+namespace+`]}`))
			s.has(namespace, "registry.one")
			s.ready(s.prefix, 1)
			injection.Remove()
			mu.Lock()
			defer mu.Unlock()
			// 0.1 + 0.2 + 0.4 + 0.8 s
			require.GreaterOrEqual(t, tries[failures].Sub(tries[0]), 1500*time.Millisecond)
		})
	}
}

// The answer to the write of a rendered Secret is lost, while agents already go by it: it
// is not rendered anew for that.
func TestALostAnswerCostsNoSecondRotation(t *testing.T) {
	s := newSystemBehindProxy(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a")
	history := s.observe()
	namespace := s.namespace(map[string]string{s.prefix: "a"}, nil)
	s.pod(namespace, "node-a", nil, nil)
	lost := s.proxy.Inject(cluster.Fault{Times: 1, HoldAfter: true, Match: func(r cluster.Request) bool {
		return r.Verb == "patch" && r.Namespace == renderedNamespace
	}})
	r := s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`))
	s.has(namespace, "registry.one") // by the agent, while the coordinator waits
	(<-lost.Held()).Drop()
	s.ready(s.prefix, 1)
	history.is(s, []string{namespace}, watch.Added)
	require.Equal(t, string(r.UID)+".1", s.secret(namespace, secretName).Annotations[impsync.AnnotationRevision])
	s.calm()
}

// A token that is refused for a while, as when the keys of the API server are changed.
func TestATokenThatIsRefusedForAWhileCostsNothingButTime(t *testing.T) {
	s := newSystemBehindProxy(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator(func(c *clusterduty.Config) { c.DemandLinger = clusterduty.DefaultDemandLinger })
	s.agent("node-a")
	steps := 0
	s.doneOnce(func(step func()) {
		if steps++; steps != 2 {
			step()
			return
		}
		refused := s.proxy.Inject(cluster.Fault{Times: 30, Status: failure(http.StatusUnauthorized, metav1.StatusReasonUnauthorized)})
		defer refused.Remove()
		s.proxy.BreakAll() // the watches have to ask anew
		step()
	})
}

// swappedToken puts a token into requests that can be another at any time, as that of a
// Pod is.
type swappedToken struct {
	token atomic.Pointer[string]
}

func (w *swappedToken) set(token string) { w.token.Store(&token) }

func (w *swappedToken) wrap(config *rest.Config) {
	config.BearerToken = ""
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(r *http.Request) (*http.Response, error) {
			r = r.Clone(r.Context())
			r.Header.Set("Authorization", "Bearer "+*w.token.Load())
			return next.RoundTrip(r)
		})
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestAServiceAccountThatIsDeletedAndMadeAgainCostsNothingButTime(t *testing.T) {
	s := newSystemBehindProxy(t)
	var coordinator, agent swappedToken
	tokens := func() {
		token, err := s.control.Token(t.Context(), systemNamespace, "imps-coordinator")
		require.NoError(t, err)
		coordinator.set(token)
		agent.set(s.nodeToken("node-a"))
	}
	tokens()
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator(func(c *clusterduty.Config) { coordinator.wrap(c.Client) })
	s.agent("node-a", func(c *nodeduty.Config) { agent.wrap(c.Client) })
	labelled, byPods := s.namespace(map[string]string{s.prefix: "a"}, nil), s.namespace(nil, nil)
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`+"\n"+podRules(s.prefix)))
	was := s.has(labelled, "registry.one")
	s.ready(s.prefix, 1)

	accounts := s.core.CoreV1().ServiceAccounts(systemNamespace)
	for _, name := range []string{"imps-coordinator", "imps-node"} {
		require.NoError(t, accounts.Delete(t.Context(), name, metav1.DeleteOptions{}))
	}
	for _, token := range []*swappedToken{&coordinator, &agent} { // the API server remembers a token for ten seconds
		old, err := kubernetes.NewForConfig(s.control.ConfigForToken(*token.token.Load()))
		require.NoError(t, err)
		s.eventually(func() error {
			_, err := old.AuthenticationV1().SelfSubjectReviews().Create(t.Context(), selfReview(), metav1.CreateOptions{})
			if !apierrors.IsUnauthorized(err) {
				return fmt.Errorf("it is answered with %w", err)
			}
			return nil
		}, "the token of a deleted ServiceAccount is accepted")
	}
	mark := s.control.Audit().Mark()
	s.proxy.BreakAll()
	s.source("hub", dockerConfig("registry.two"))
	s.pod(byPods, "node-a", map[string]string{s.prefix: "a"}, nil)
	s.eventually(func() error {
		events, err := s.control.Audit().Since(mark)
		for _, agent := range []string{"imps-test/coordinator", "imps-test/agent/node-a"} {
			if !slices.ContainsFunc(events, func(e cluster.Event) bool { return e.UserAgent == agent && e.Code == http.StatusUnauthorized }) {
				return fmt.Errorf("%s was not refused", agent)
			}
		}
		return err
	}, "nobody is refused")
	for _, name := range []string{"imps-coordinator", "imps-node"} {
		_, err := accounts.Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		require.NoError(t, err)
	}
	tokens()
	require.Equal(t, was.UID, s.has(labelled, "registry.two").UID)
	s.has(byPods, "registry.two")
	s.ready(s.prefix, 2)
	s.calm()
}
