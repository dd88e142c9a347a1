package node

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/dockerconfig"
	"github.com/imps-node/imps/pkg/nodecache"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// cachingAgent is an agent in which nothing runs, with a node cache.
type cachingAgent struct {
	*testAgent
	cache cache
}

func newCachingAgent(t *testing.T) *cachingAgent {
	t.Helper()
	a := &cachingAgent{testAgent: newTestAgent(t)}
	a.config.CacheDir = filepath.Join(t.TempDir(), "imps")
	t.Cleanup(a.cache.close)
	return a
}

// write has the agent write its cache where anything has changed.
func (a *cachingAgent) write(t *testing.T) {
	t.Helper()
	require.NoError(t, a.openCache(&a.cache))
	require.NoError(t, a.writeCache(&a.cache, false))
}

// holding is a rendered form with these registries, "registry=password".
func holding(t *testing.T, name string, minutes int, target string, registries map[string]string) impsync.Rendered {
	t.Helper()
	r := rendered(t, name, minutes, target, 1)
	var entries []dockerconfig.Entry
	for registry, password := range registries {
		entries = append(entries, dockerconfig.Entry{
			Key: dockerconfig.NewSensitive(registry), Username: dockerconfig.NewSensitive("u"), Password: dockerconfig.NewSensitive(password),
		})
	}
	config, err := dockerconfig.New(entries...)
	require.NoError(t, err)
	raw, err := config.Render()
	require.NoError(t, err)
	r.Target, err = r.Target.WithConfig(2, raw)
	require.NoError(t, err)
	return r
}

// answers returns the passwords that a scope has for a registry's image; nil where the scope is not known.
func (a *cachingAgent) answers(t *testing.T, scope nodecache.Scope, image string) []string {
	t.Helper()
	found, err := nodecache.NewReader(a.config.CacheDir).Lookup(scope, image, 0)
	if errors.Is(err, nodecache.ErrUnknown) {
		return nil
	}
	require.NoError(t, err)
	passwords := []string{}
	for _, c := range found.Credentials {
		_, password := c.Reveal()
		passwords = append(passwords, password)
	}
	slices.Sort(passwords)
	return passwords
}

const (
	ofNode      = `{secret: {name: pull}, kubelet: {scope: Node}}`
	ofNamespace = `{secret: {name: pull}, namespaces: {names: [a]}, kubelet: {}}`
	ofLabel     = `{secret: {name: pull}, namespaces: {labels: [{matchLabels: {team: red}}]}, kubelet: {}}`
)

func TestTheNodeCacheHoldsWhatPodsMayPull(t *testing.T) {
	t.Parallel()
	a := newCachingAgent(t)
	one := map[string]string{"r.one": "old", "https://r.two/v1/": "2"}
	a.serves(holding(t, "elder", 0, ofNamespace, map[string]string{"r.one": "elder"}))
	a.serves(holding(t, "younger", 1, `{secret: {name: other}, namespaces: {names: [a, b, kube-system]}, kubelet: {scope: Namespace}}`, one))
	a.serves(holding(t, "pods", 2, `{secret: {name: third}, namespacesWithPods: {labels: [{matchLabels: {app: web}}]}, kubelet: {}}`, map[string]string{"r.four": "4"}))
	a.serves(holding(t, "node", 3, ofNode, map[string]string{"r.three": "3"}))
	a.serves(holding(t, "silent", 4, `{secret: {name: pull}, namespaces: {names: [a, b, c]}}`, map[string]string{"r.five": "5"}))
	for _, namespace := range []string{"a", "b", "c", "kube-system"} {
		a.pod(namespace, "p", &pod{live: true})
	}
	a.pod("d", "p", &pod{live: true, labels: web})
	a.pod("e", "ended", &pod{})
	a.write(t)
	namespaces := nodecache.InNamespace
	for _, c := range []struct {
		scope nodecache.Scope
		image string
		want  []string
	}{
		{nodecache.Node, "r.three/app", []string{"3"}},
		{nodecache.Node, "r.one/app", []string{}},
		{namespaces("a"), "r.one/app", []string{"elder"}}, // the older resource's
		{namespaces("a"), "r.two/app", []string{"2"}},
		{namespaces("a"), "r.three/app", []string{}},
		{namespaces("b"), "r.one/app", []string{"old"}},
		{namespaces("b"), "r.five/app", []string{}}, // not served to kubelets
		{namespaces("c"), "r.one/app", []string{}},  // it has a Pod here, and may pull nothing
		{namespaces("d"), "r.four/app", []string{"4"}},
		{namespaces("e"), "r.one/app", nil}, // it has none that may pull any more
		{namespaces("kube-system"), "r.one/app", []string{}},
	} {
		require.Equal(t, c.want, a.answers(t, c.scope, c.image), "%v %s", c.scope, c.image)
	}
	require.Empty(t, a.server.asked(), "no namespace had to be read")
	require.Empty(t, a.watched)
}

func TestTheNodeCacheFollows(t *testing.T) {
	t.Parallel()
	a := newCachingAgent(t)
	scope := nodecache.InNamespace("a")
	changes := func() {
		t.Helper()
		select {
		case <-a.cacheDirty:
		default:
			require.Fail(t, "nothing has it written")
		}
		a.write(t)
	}
	a.serves(holding(t, "r", 0, ofNamespace, map[string]string{"r.one": "1"}))
	a.pod("a", "p", &pod{live: true, waiting: true})
	changes()
	require.Equal(t, []string{"1"}, a.answers(t, scope, "r.one/app"))
	a.serves(holding(t, "r", 0, ofNamespace, map[string]string{"r.one": "rotated"}))
	changes()
	require.Equal(t, []string{"rotated"}, a.answers(t, scope, "r.one/app"))
	a.serves(holding(t, "r", 0, ofNode, map[string]string{"r.one": "rotated"}))
	changes()
	require.Empty(t, a.answers(t, scope, "r.one/app"))
	require.Equal(t, []string{"rotated"}, a.answers(t, nodecache.Node, "r.one/app"))
	a.renderedChanged(types.NamespacedName{Name: impsync.RenderedName("uid-r")}, nil, nil)
	changes()
	require.Empty(t, a.answers(t, nodecache.Node, "r.one/app"))
	require.NotNil(t, a.answers(t, nodecache.Node, "r.one/app"), "nothing is an answer, too")
	a.pod("a", "p", &pod{live: true})
	require.Contains(t, a.namespaces, "a", "it runs, and may pull again")
	a.pod("a", "p", &pod{})
	changes()
	require.Nil(t, a.answers(t, scope, "r.one/app"))
	require.Empty(t, a.namespaces)
}

// Labels of a namespace that decide are read, and watched as long as they do.
func TestTheNodeCacheByLabels(t *testing.T) {
	t.Parallel()
	a := newCachingAgent(t)
	scope := nodecache.InNamespace("a")
	a.serves(holding(t, "r", 0, ofLabel, map[string]string{"r.one": "1"}))
	a.pod("a", "p", &pod{live: true})
	require.Equal(t, []string{"a"}, a.queued())
	a.write(t)
	require.Error(t, a.serve(t.Context(), "a"), "the API server is away")
	require.Equal(t, []string{"GET /api/v1/namespaces/a"}, a.server.asked())
	require.Nil(t, a.answers(t, scope, "r.one/app"), "it is not known what it may pull")
	require.Equal(t, map[string]bool{"a": true}, a.watched)
	a.known("a", map[string]string{"team": "red"})
	a.write(t)
	require.Equal(t, []string{"1"}, a.answers(t, scope, "r.one/app"))
	a.known("a", map[string]string{"team": "blue"})
	a.write(t)
	require.Empty(t, a.answers(t, scope, "r.one/app"))
	require.NotNil(t, a.answers(t, scope, "r.one/app"))
	require.Empty(t, a.server.asked())
	a.serves(holding(t, "r", 0, ofNamespace, map[string]string{"r.one": "1"}))
	require.Empty(t, a.watched, "nothing depends on its labels any more")
	a.write(t)
	require.Equal(t, []string{"1"}, a.answers(t, scope, "r.one/app"))
}

// An agent that starts leaves what is there, as long as it cannot read what that is of.
func TestTheNodeCacheOutlivesItsAgent(t *testing.T) {
	t.Parallel()
	a := newCachingAgent(t)
	password := map[string]string{"r.one": "1"}
	a.serves(holding(t, "r", 0, ofNamespace, password))
	a.serves(holding(t, "n", 1, ofNode, password))
	a.pod("a", "p", &pod{live: true})
	a.pod("gone", "p", &pod{live: true})
	a.write(t)

	a.cache.close()

	next := newCachingAgent(t)
	next.config.CacheDir = a.config.CacheDir
	unreadable := types.NamespacedName{Namespace: "imps-rendered", Name: impsync.RenderedName("uid-r")}
	next.rendered.Put(unreadable, renderedSecret{err: impsync.ErrFormatVersion})
	next.pod("a", "p", &pod{live: true})
	next.pod("new", "p", &pod{live: true})
	next.write(t)
	require.Equal(t, []string{"1"}, next.answers(t, nodecache.InNamespace("a"), "r.one/app"))
	require.Equal(t, []string{"1"}, next.answers(t, nodecache.Node, "r.one/app"))
	require.NotNil(t, next.answers(t, nodecache.InNamespace("gone"), "r.one/app"))
	require.Empty(t, next.answers(t, nodecache.InNamespace("new"), "r.one/app"))
	require.NotNil(t, next.answers(t, nodecache.InNamespace("new"), "r.one/app"))

	// What can be read is not held up by what cannot.
	next.serves(holding(t, "n", 1, ofNode, map[string]string{"r.one": "rotated", "r.two": "new"}))
	next.write(t)
	require.Equal(t, []string{"rotated"}, next.answers(t, nodecache.Node, "r.one/app"))
	require.Equal(t, []string{"new"}, next.answers(t, nodecache.Node, "r.two/app"))
	require.Equal(t, []string{"1"}, next.answers(t, nodecache.InNamespace("a"), "r.one/app"))

	next.rendered.Drop(unreadable, func(renderedSecret) bool { return true })
	next.write(t)
	require.Empty(t, next.answers(t, nodecache.InNamespace("a"), "r.one/app"))
	require.Nil(t, next.answers(t, nodecache.InNamespace("gone"), "r.one/app"), "it has no Pod here any more")
}

// A Secret that is no rendered one holds nothing up, whoever put it there.
func TestAForeignSecretAmongTheRenderedOnes(t *testing.T) {
	t.Parallel()
	a := newCachingAgent(t)
	old, err := nodecache.Open(a.config.CacheDir)
	require.NoError(t, err)
	_, err = old.Set(nodecache.Node, []nodecache.Entry{{Key: "r.gone", Username: dockerconfig.NewSensitive("u"), Password: dockerconfig.NewSensitive("p")}})
	require.NoError(t, err)
	require.NoError(t, old.Close())
	for _, s := range []*corev1.Secret{
		{ObjectMeta: metav1.ObjectMeta{Name: "pull"}, Type: corev1.SecretTypeDockerConfigJson},
		{ObjectMeta: metav1.ObjectMeta{Name: "pull"}, Type: impsync.RenderedType},
		{ObjectMeta: metav1.ObjectMeta{Name: impsync.RenderedName("x")}, Type: corev1.SecretTypeOpaque},
	} {
		a.rendered.Put(types.NamespacedName{Namespace: "imps-rendered", Name: s.Name}, a.convertRendered(s))
	}
	a.write(t)
	require.Empty(t, a.answers(t, nodecache.Node, "r.gone/app"))
	require.Empty(t, a.unread())
}

// A scope is written when those that serve it change, and looked at when the agent's pass comes.
func TestTheNodeCacheIsLookedAt(t *testing.T) {
	t.Parallel()
	a := newCachingAgent(t)
	record := func() string {
		files, err := filepath.Glob(filepath.Join(a.config.CacheDir, "node", "h-*"))
		require.NoError(t, err)
		require.Len(t, files, 1)
		return files[0]
	}
	a.serves(holding(t, "r", 0, ofNode, map[string]string{"r.one": "1"}))
	a.write(t)
	require.NoError(t, os.Remove(record()))
	a.write(t)
	require.Empty(t, a.answers(t, nodecache.Node, "r.one/app"), "nothing has changed")
	require.NoError(t, a.writeCache(&a.cache, true))
	require.Equal(t, []string{"1"}, a.answers(t, nodecache.Node, "r.one/app"))

	require.NoError(t, os.RemoveAll(a.config.CacheDir))
	a.write(t)
	require.Contains(t, a.log.String(), "writing it anew")
	require.Equal(t, []string{"1"}, a.answers(t, nodecache.Node, "r.one/app"), "all of it is written anew")
}

// What the API server takes for the time counts where the clock of the machine is behind.
func TestTheTimeOfTheAPIServer(t *testing.T) {
	t.Parallel()
	a := newCachingAgent(t)
	r := holding(t, "r", 0, ofNode, map[string]string{"r.one": "1"})
	r.Expiries = map[string]time.Time{"r.one": time.Now().Add(time.Hour)}
	a.serves(r)
	a.write(t)
	require.Equal(t, []string{"1"}, a.answers(t, nodecache.Node, "r.one/app"))
	answer := func(*http.Request) (*http.Response, error) {
		return &http.Response{Header: http.Header{"Date": {time.Now().Add(2 * time.Hour).UTC().Format(http.TimeFormat)}}}, nil
	}
	_, err := a.dated(roundTripper(answer)).RoundTrip(nil) //nolint:bodyclose // it has none
	require.NoError(t, err)
	require.NoError(t, a.writeCache(&a.cache, true))
	require.Empty(t, a.answers(t, nodecache.Node, "r.one/app"), "it has expired")
	said := a.serverTime.Load()
	_, err = a.dated(a.server).RoundTrip(&http.Request{URL: &url.URL{}}) //nolint:bodyclose // it has none
	require.Error(t, err)
	require.Same(t, said, a.serverTime.Load(), "an answer that does not come says nothing")
}

// A cache that cannot be written is tried again, and its state is in the report.
func TestANodeCacheThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	a := newCachingAgent(t)
	a.serves(holding(t, "r", 0, ofNode, map[string]string{"r.one": canary}))
	require.NoError(t, os.WriteFile(a.config.CacheDir, nil, 0o600))
	problem := func() string { return a.currentReport().Kubelet.Problem }
	require.Equal(t, "the node cache is not written yet", problem())
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.keepCache(ctx) }()
	close(a.ready)
	require.Eventually(t, func() bool { return strings.Contains(problem(), "not a directory") }, time.Minute, time.Millisecond)
	require.NoError(t, os.Remove(a.config.CacheDir))
	require.Eventually(t, func() bool { return problem() == "" }, time.Minute, time.Millisecond)
	require.Equal(t, []string{canary}, a.answers(t, nodecache.Node, "r.one/app"))
	stop()
	require.NoError(t, <-done)
	require.True(t, a.isDirty())
	require.Equal(t, 1, strings.Count(a.log.String(), "level=WARN"))
	require.Contains(t, a.log.String(), "the node cache is up to date")
	require.NotContains(t, a.log.String(), canary)
	require.False(t, nodecache.Alive(a.config.CacheDir), "it has given the folder up")

	a.config.CacheDir = ""
	require.Nil(t, a.currentReport().Kubelet)
}

// An agent whose folder another one writes waits for it.
func TestANodeCacheThatAnotherAgentWrites(t *testing.T) {
	t.Parallel()
	a := newCachingAgent(t)
	a.serves(holding(t, "r", 0, ofNode, map[string]string{"r.one": "1"}))
	other, err := nodecache.Open(a.config.CacheDir)
	require.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.keepCache(ctx) }()
	close(a.ready)
	problem := func() string { return a.currentReport().Kubelet.Problem }
	require.Eventually(t, func() bool { return strings.Contains(problem(), "another agent writes it") }, time.Minute, time.Millisecond)
	require.NoError(t, other.Close())
	require.Eventually(t, func() bool { return problem() == "" }, time.Minute, time.Millisecond)
	require.Equal(t, []string{"1"}, a.answers(t, nodecache.Node, "r.one/app"))
	stop()
	require.NoError(t, <-done)
}

// Before its lists are in an agent writes nothing, and holds the lock, so that the provider waits.
func TestANodeCacheThatIsNotReady(t *testing.T) {
	t.Parallel()
	a := newCachingAgent(t)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.keepCache(ctx) }()
	require.Eventually(t, func() bool { return nodecache.Alive(a.config.CacheDir) }, time.Minute, time.Millisecond)
	require.Nil(t, a.answers(t, nodecache.Node, "r.one/app"))
	close(a.ready)
	require.Eventually(t, func() bool { return a.answers(t, nodecache.Node, "r.one/app") != nil }, time.Minute, time.Millisecond)
	stop()
	require.NoError(t, <-done)
}

// What was reported last of the node cache stays until this agent knows better.
func TestTheNodeCacheInTheFirstReport(t *testing.T) {
	t.Parallel()
	a := newCachingAgent(t)
	data, err := impsync.Report{Node: "n1", Kubelet: &impsync.KubeletReport{Problem: "of before"}}.Encode()
	require.NoError(t, err)
	a.report.Put(types.NamespacedName{Namespace: "imps-system", Name: impsync.ReportName("n1")}, data[impsync.ReportKey])
	require.Equal(t, "of before", a.currentReport().Kubelet.Problem)
	a.cacheWritten(nil)
	require.Empty(t, a.currentReport().Kubelet.Problem)
}

// Metadata that is read when the watch has ended is good for once: nobody would tell of the next change.
func TestANamespaceThatIsReleasedWhileItIsRead(t *testing.T) {
	t.Parallel()
	a := newCachingAgent(t)
	a.serves(holding(t, "r", 0, `{secret: {name: pull}, namespaces: {labels: [{matchLabels: {team: red}}]}}`, map[string]string{"r.one": "1"}))
	a.pod("a", "p", &pod{live: true, waiting: true})
	a.server.answer = func(request *http.Request) (*http.Response, error) {
		a.pod("a", "p", &pod{live: true}) // it has started
		body := `{"apiVersion":"meta.k8s.io/v1","kind":"PartialObjectMetadata","metadata":{"name":"a","labels":{"team":"red"}}}`
		return &http.Response{StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader(body)), Request: request}, nil
	}
	meta, err := a.readNamespace(t.Context(), "a")
	require.NoError(t, err)
	require.Equal(t, map[string]string{"team": "red"}, meta.labels)
	require.Empty(t, a.watched)
	require.Nil(t, a.knownNamespace("a"))

	ctx, stop := context.WithCancel(t.Context())
	stop()
	a.namespaceRead(ctx, "a", a.namespaces["a"], &namespaceMeta{})
	require.Nil(t, a.knownNamespace("a"), "so is what a watch brings that has ended")
}
