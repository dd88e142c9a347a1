package cluster

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	typedv1 "k8s.io/client-go/kubernetes/typed/core/v1"
)

// longEnough bounds what must not happen for a while.
const longEnough = 300 * time.Millisecond

func startProxy(t *testing.T) *Proxy {
	t.Helper()
	p, err := shared.Proxy(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	return p
}

// through returns a client of the admin that connects through a proxy.
func through(t *testing.T, p *Proxy) *kubernetes.Clientset {
	t.Helper()
	return clientFor(t, p.Config(shared.Admin()))
}

func TestProxyReadsRequestsAsTheAuditLogDoes(t *testing.T) {
	p := startProxy(t)
	namespace, agent := shared.Namespace(t, nil), Prefix(t)
	config := p.Config(shared.Admin())
	config.UserAgent = agent
	client := clientFor(t, config)
	maps := client.CoreV1().ConfigMaps(namespace)
	var seen []Request
	p.Inject(Fault{Match: func(r Request) bool {
		seen = append(seen, r)
		return false
	}})
	mark := shared.Audit().Mark()

	ctx := t.Context()
	_, err := maps.Create(ctx, configMap("one"), metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = maps.Get(ctx, "one", metav1.GetOptions{})
	require.NoError(t, err)
	_, err = maps.Patch(ctx, "one", types.MergePatchType, []byte(`{"data":{"key":"value"}}`), metav1.PatchOptions{})
	require.NoError(t, err)
	_, err = maps.Update(ctx, configMap("one"), metav1.UpdateOptions{})
	require.NoError(t, err)
	_, err = maps.List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=one"})
	require.NoError(t, err)
	_, err = client.CoreV1().Secrets("").List(ctx, metav1.ListOptions{Limit: 1})
	require.NoError(t, err)
	watcher, err := client.AppsV1().Deployments(namespace).Watch(ctx, metav1.ListOptions{})
	require.NoError(t, err)
	watcher.Stop()
	require.NoError(t, maps.Delete(ctx, "one", metav1.DeleteOptions{}))
	require.NoError(t, maps.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}))
	_, err = client.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
	require.NoError(t, err)
	_, err = client.CoreV1().Namespaces().Patch(ctx, namespace, types.MergePatchType, []byte(`{}`), metav1.PatchOptions{}, "status")
	require.NoError(t, err)
	_, err = client.Discovery().ServerVersion()
	require.NoError(t, err)

	var want, have []string
	events := map[string]bool{}
	for _, e := range eventsOf(t, mark, func(e Event) bool { return e.UserAgent == agent }) {
		if e.Verb == "create" {
			e.Name = ""
		}
		if !events[e.ID] { // a watch has two
			want = append(want, fmt.Sprint(e.Verb, "|", e.Group, "|", e.Resource, "|", e.Subresource, "|", e.Namespace, "|", e.Name))
		}
		events[e.ID] = true
	}
	for _, r := range seen {
		have = append(have, fmt.Sprint(r.Verb, "|", r.Group, "|", r.Resource, "|", r.Subresource, "|", r.Namespace, "|", r.Name))
		require.Equal(t, agent, r.UserAgent)
		require.Equal(t, 2, r.HTTP.ProtoMajor)
	}
	require.Equal(t, want, have)
	require.Len(t, seen, 12)
}

func TestProxyKeepsIdentitiesAndHeaders(t *testing.T) {
	p := startProxy(t)

	t.Run("a token", func(t *testing.T) {
		require.Equal(t, "admin", whoami(t, p.Config(shared.Admin())).Username)
	})

	t.Run("a certificate, made again for the way to the API server", func(t *testing.T) {
		config, err := shared.ConfigForUser("jane", "team-a", "team-b")
		require.NoError(t, err)
		user := whoami(t, p.Config(config))
		require.Equal(t, "jane", user.Username)
		require.Subset(t, user.Groups, []string{"team-a", "team-b"})
	})

	t.Run("nobody's", func(t *testing.T) {
		_, err := clientFor(t, p.Config(shared.ConfigForToken("wrong"))).CoreV1().Namespaces().Get(t.Context(), "default", metav1.GetOptions{})
		require.True(t, apierrors.IsUnauthorized(err), "%v", err)
	})

	t.Run("a wish for protobuf", func(t *testing.T) {
		config := p.Config(shared.Admin())
		config.ContentType = runtime.ContentTypeProtobuf
		var accepted string
		counted := p.Inject(Fault{Match: func(r Request) bool {
			accepted = r.HTTP.Header.Get("Accept")
			return true
		}})
		defer counted.Remove()
		_, err := clientFor(t, config).CoreV1().Namespaces().Get(t.Context(), "default", metav1.GetOptions{})
		require.NoError(t, err)
		require.True(t, strings.HasPrefix(accepted, runtime.ContentTypeProtobuf), accepted)
		require.Equal(t, 1, counted.Hits())
	})
}

func TestProxyCarriesManyWatchesAtOnce(t *testing.T) {
	p := startProxy(t)
	maps := through(t, p).CoreV1().ConfigMaps(shared.Namespace(t, nil))
	const many = 200
	var watchers []watch.Interface
	for range many {
		watchers = append(watchers, watchFrom(t, maps, ""))
	}
	_, err := maps.Create(t.Context(), configMap("one"), metav1.CreateOptions{})
	require.NoError(t, err)
	for _, watcher := range watchers {
		require.Equal(t, "one", nextName(t, watcher))
	}
}

func TestProxyFaults(t *testing.T) {
	p := startProxy(t)
	namespace := shared.Namespace(t, nil)
	direct := shared.Client().CoreV1().ConfigMaps(namespace)
	maps := through(t, p).CoreV1().ConfigMaps(namespace)
	create := func(name string) error {
		_, err := maps.Create(t.Context(), configMap(name), metav1.CreateOptions{})
		return err
	}
	creates := func(r Request) bool { return r.Verb == "create" && r.Namespace == namespace }
	watches := func(r Request) bool { return r.Verb == "watch" && r.Namespace == namespace }
	exists := func(t *testing.T, name string) bool {
		t.Helper()
		_, err := direct.Get(t.Context(), name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return false
		}
		require.NoError(t, err)
		return true
	}

	t.Run("latency passes before the server sees the request", func(t *testing.T) {
		defer p.Inject(Fault{Match: creates, Latency: longEnough}).Remove()
		began := time.Now()
		require.NoError(t, create("late"))
		require.GreaterOrEqual(t, time.Since(began), longEnough)
	})

	t.Run("a reset before the server, as often as it was asked for", func(t *testing.T) {
		injection := p.Inject(Fault{Match: creates, Times: 2, ResetBefore: true})
		require.Error(t, create("before"))
		require.Error(t, create("before"))
		require.False(t, exists(t, "before"))
		require.NoError(t, create("before"))
		require.Equal(t, 2, injection.Hits())
	})

	t.Run("a reset after the server has done it", func(t *testing.T) {
		p.Inject(Fault{Match: creates, Times: 1, ResetAfter: true})
		require.Error(t, create("after"))
		require.True(t, exists(t, "after"))
	})

	t.Run("an answer of the proxy's own", func(t *testing.T) {
		for _, code := range []int{http.StatusTooManyRequests, http.StatusServiceUnavailable, http.StatusInternalServerError, http.StatusGone} {
			status := Failure(code, metav1.StatusReasonUnknown, "made up by the proxy")
			status.Header.Set("X-Made-Up", "yes")
			p.Inject(Fault{Match: creates, Times: 1, Status: status})
			err := create("answered")
			require.ErrorContains(t, err, "made up by the proxy")
			var api apierrors.APIStatus
			require.ErrorAs(t, err, &api)
			require.EqualValues(t, code, api.Status().Code)
		}
		require.False(t, exists(t, "answered"))
	})

	t.Run("of two faults the first injected hits", func(t *testing.T) {
		first := p.Inject(Fault{Match: creates, Times: 1, Status: Failure(http.StatusConflict, metav1.StatusReasonConflict, "first")})
		second := p.Inject(Fault{Match: creates, Status: Failure(http.StatusConflict, metav1.StatusReasonConflict, "second")})
		require.ErrorContains(t, create("two"), "first")
		require.ErrorContains(t, create("two"), "second")
		second.Remove()
		require.NoError(t, create("two"))
		require.Equal(t, 1, first.Hits())
		require.Equal(t, 1, second.Hits())
	})

	t.Run("a truncated answer", func(t *testing.T) {
		for _, bytes := range []int{AtOnce, 1, 20} {
			p.Inject(Fault{Match: creates, Times: 1, Truncate: bytes})
			name := "truncated" + strconv.Itoa(max(bytes, 0))
			require.Error(t, create(name))
			require.True(t, exists(t, name))
		}
	})

	t.Run("a watch that breaks after an event", func(t *testing.T) {
		for _, contentType := range []string{runtime.ContentTypeProtobuf, runtime.ContentTypeJSON} {
			for events := range 3 {
				config := p.Config(shared.Admin())
				config.ContentType = contentType
				maps := clientFor(t, config).CoreV1().ConfigMaps(namespace)
				from := version(t, direct)
				p.Inject(Fault{Match: watches, Times: 1, TruncateEvents: cmp.Or(events, AtOnce)})
				watcher := watchFrom(t, maps, from)
				var names []string
				for n := range 3 {
					name := fmt.Sprintf("event-%d", n)
					names = append(names, name)
					_, err := direct.Create(t.Context(), configMap(name), metav1.CreateOptions{})
					require.NoError(t, err)
				}
				for _, name := range names[:events] {
					require.Equal(t, name, nextName(t, watcher))
				}
				requireBroken(t, watcher)
				for _, name := range names {
					require.NoError(t, direct.Delete(t.Context(), name, metav1.DeleteOptions{}))
				}
			}
		}
	})

	t.Run("a watch that stalls, and goes on when the fault is removed", func(t *testing.T) {
		injection := p.Inject(Fault{Match: watches, StallAfter: AtOnce})
		watcher := watchFrom(t, maps, version(t, direct))
		_, err := direct.Create(t.Context(), configMap("stalled"), metav1.CreateOptions{})
		require.NoError(t, err)
		requireSilent(t, watcher)
		injection.Remove()
		require.Equal(t, "stalled", nextName(t, watcher))
	})

	t.Run("a watch that stalls in the middle", func(t *testing.T) {
		injection := p.Inject(Fault{Match: watches, StallAfter: 1000})
		watcher := watchFrom(t, maps, version(t, direct))
		seen := 0
		for ; seen < 20; seen++ {
			_, err := direct.Create(t.Context(), configMap(fmt.Sprintf("middle-%d", seen)), metav1.CreateOptions{})
			require.NoError(t, err)
		}
		require.Equal(t, "middle-0", nextName(t, watcher))
		received := 1
		for stalled := false; !stalled; {
			select {
			case event := <-watcher.ResultChan():
				require.Equal(t, watch.Added, event.Type)
				received++
			case <-time.After(longEnough):
				stalled = true
			}
		}
		require.Less(t, received, seen)
		injection.Remove()
		require.Equal(t, fmt.Sprintf("middle-%d", received), nextName(t, watcher))
	})

	t.Run("a stalled watch breaks with its connection", func(t *testing.T) {
		defer p.Inject(Fault{Match: watches, StallAfter: AtOnce}).Remove()
		watcher := watchFrom(t, maps, "")
		p.BreakAll()
		requireBroken(t, watcher)
	})

	t.Run("what breaks all connections breaks watches, and no later request", func(t *testing.T) {
		watcher := watchFrom(t, maps, "")
		p.BreakAll()
		requireBroken(t, watcher)
		poll(t, func(context.Context) bool { return create("again") == nil })
	})

	for name, fault := range map[string]Fault{"before": {Hold: true}, "after": {HoldAfter: true}} {
		held := func(t *testing.T, i *Injection) *Held {
			t.Helper()
			select {
			case h := <-i.Held():
				return h
			case <-time.After(pollLimit):
				require.Fail(t, "nothing is held")
				return nil
			}
		}
		fault.Match = creates
		try := func(object string) <-chan error {
			done := make(chan error, 1)
			go func() { done <- create(object) }()
			return done
		}
		t.Run("a request held "+name+" the server, and released", func(t *testing.T) {
			injection := p.Inject(fault)
			defer injection.Remove()
			done := try("released-" + name)
			h := held(t, injection)
			require.Equal(t, "create", h.Request.Verb)
			require.Empty(t, done)
			require.Equal(t, fault.HoldAfter, exists(t, "released-"+name))
			h.Release()
			h.Drop() // too late
			require.NoError(t, <-done)
		})
		t.Run("a request held "+name+" the server, and dropped", func(t *testing.T) {
			injection := p.Inject(fault)
			defer injection.Remove()
			done := try("dropped-" + name)
			h := held(t, injection)
			h.Drop()
			require.Error(t, <-done)
			require.Equal(t, fault.HoldAfter, exists(t, "dropped-"+name))
		})
		t.Run("requests held "+name+" the server go on when the fault is removed", func(t *testing.T) {
			injection := p.Inject(fault)
			taken, waiting := try("taken-"+name), try("waiting-"+name)
			held(t, injection)
			poll(t, func(context.Context) bool { return injection.Hits() == 2 })
			injection.Remove()
			injection.Remove()
			require.NoError(t, <-taken)
			require.NoError(t, <-waiting)
		})
	}
}

func TestProxyClosesWithEverythingUnderWay(t *testing.T) {
	p, err := shared.Proxy(t.Context())
	require.NoError(t, err)
	namespace := shared.Namespace(t, nil)
	maps := through(t, p).CoreV1().ConfigMaps(namespace)
	passing := watchFrom(t, maps, "")
	p.Inject(Fault{Match: func(r Request) bool { return r.Verb == "watch" }, StallAfter: AtOnce})
	stalled := watchFrom(t, maps, "")
	done := make(chan error, 3)
	for _, fault := range []Fault{{Hold: true}, {HoldAfter: true}, {Latency: time.Hour}} {
		fault.Times = 1
		injection := p.Inject(fault)
		go func() {
			_, err := maps.Create(context.WithoutCancel(t.Context()), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "one-"}}, metav1.CreateOptions{})
			done <- err
		}()
		poll(t, func(context.Context) bool { return injection.Hits() == 1 })
	}

	require.NoError(t, p.Close())
	for range cap(done) {
		require.Error(t, <-done)
	}
	requireBroken(t, passing)
	requireBroken(t, stalled)
	require.NoError(t, p.Close())
}

func TestCompactEtcd(t *testing.T) {
	maps := shared.Client().CoreV1().ConfigMaps(shared.Namespace(t, nil))
	old := version(t, maps)
	_, err := maps.Create(t.Context(), configMap("one"), metav1.CreateOptions{})
	require.NoError(t, err)
	then := map[string]any{"key": "Lw==", "revision": old} // "/"
	_, err = shared.callEtcd(t.Context(), "kv/range", then)
	require.NoError(t, err)
	require.NoError(t, shared.CompactEtcd(t.Context()))
	_, err = shared.callEtcd(t.Context(), "kv/range", then)
	require.ErrorContains(t, err, "has been compacted")
	require.NoError(t, shared.StopAPIServer())
	require.NoError(t, shared.StartAPIServer(t.Context()))

	watcher, err := maps.Watch(t.Context(), metav1.ListOptions{ResourceVersion: old})
	if err == nil {
		t.Cleanup(watcher.Stop)
		err = apierrors.FromObject((<-watcher.ResultChan()).Object)
	}
	require.True(t, apierrors.IsResourceExpired(err), "%v", err)
	require.NoError(t, shared.CompactEtcd(t.Context()), "with nothing to drop")
}

func TestEtcdThatIsFull(t *testing.T) {
	c := Start(t, WithEtcdQuota(16<<20))
	maps := c.Client().CoreV1().ConfigMaps("default")
	_, err := maps.Create(t.Context(), configMap("growing"), metav1.CreateOptions{})
	require.NoError(t, err)
	fill := func(value string) error {
		patch := fmt.Sprintf(`{"data":{"key":%q}}`, strings.Repeat(value, 512<<10))
		_, err := maps.Patch(t.Context(), "growing", types.MergePatchType, []byte(patch), metav1.PatchOptions{})
		return err
	}
	for n := 0; err == nil; n++ {
		require.Less(t, n, 1000)
		err = fill(strconv.Itoa(n % 10))
	}
	require.ErrorContains(t, err, "database space exceeded")
	_, err = maps.Create(t.Context(), configMap("one"), metav1.CreateOptions{})
	require.ErrorContains(t, err, "database space exceeded")

	require.NoError(t, c.FreeEtcd(t.Context()))
	_, err = maps.Create(t.Context(), configMap("one"), metav1.CreateOptions{})
	require.NoError(t, err)
}

// version is what a list of now would begin a watch with.
func version(t *testing.T, maps typedv1.ConfigMapInterface) string {
	t.Helper()
	list, err := maps.List(t.Context(), metav1.ListOptions{})
	require.NoError(t, err)
	return list.ResourceVersion
}

func watchFrom(t *testing.T, maps typedv1.ConfigMapInterface, resourceVersion string) watch.Interface {
	t.Helper()
	watcher, err := maps.Watch(t.Context(), metav1.ListOptions{ResourceVersion: resourceVersion, FieldSelector: "metadata.name!=kube-root-ca.crt"})
	require.NoError(t, err)
	t.Cleanup(watcher.Stop)
	return watcher
}

func nextName(t *testing.T, watcher watch.Interface) string {
	t.Helper()
	select {
	case event, ok := <-watcher.ResultChan():
		require.True(t, ok, "the watch has ended")
		object, ok := event.Object.(*corev1.ConfigMap)
		require.True(t, ok, "%v", event)
		return object.Name
	case <-time.After(pollLimit):
		require.Fail(t, "no event comes")
		return ""
	}
}

// requireBroken waits for the end of a watch.
func requireBroken(t *testing.T, watcher watch.Interface) {
	t.Helper()
	for {
		select {
		case _, ok := <-watcher.ResultChan():
			if !ok {
				return
			}
		case <-time.After(pollLimit):
			require.Fail(t, "the watch does not end")
		}
	}
}

func requireSilent(t *testing.T, watcher watch.Interface) {
	t.Helper()
	select {
	case event := <-watcher.ResultChan():
		require.Fail(t, "the watch does not stall", "%v", event)
	case <-time.After(longEnough):
	}
}
