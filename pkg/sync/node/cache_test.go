package node

import (
	"context"
	"errors"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/dockerconfig"
	"github.com/imps-node/imps/pkg/nodecache"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// cachingAgent is an agent in which nothing runs, with a node cache, and what reads that.
type cachingAgent struct {
	*testAgent
	dir    string
	writer *nodecache.Writer
}

func newCachingAgent(t *testing.T) *cachingAgent {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "imps")
	writer, err := nodecache.Open(dir)
	require.NoError(t, err)
	t.Cleanup(func() { _ = writer.Close() })
	a := &cachingAgent{testAgent: newTestAgent(t), dir: dir, writer: writer}
	a.config.Cache = writer
	return a
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
	found, err := nodecache.NewReader(a.dir).Lookup(scope, image, 0)
	if errors.Is(err, nodecache.ErrUnknown) {
		return nil
	}
	require.NoError(t, err)
	passwords := []string{}
	for _, c := range found {
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
	require.NoError(t, a.writeCache(t.Context()))
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
		require.NoError(t, a.writeCache(t.Context()))
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
	require.Error(t, a.writeCache(t.Context()), "the API server is away")
	require.Equal(t, []string{"GET /api/v1/namespaces/a"}, a.server.asked())
	require.Nil(t, a.answers(t, scope, "r.one/app"), "it is not known what it may pull")
	require.Equal(t, map[string]bool{"a": true}, a.watched)
	a.known("a", map[string]string{"team": "red"})
	require.NoError(t, a.writeCache(t.Context()))
	require.Equal(t, []string{"1"}, a.answers(t, scope, "r.one/app"))
	a.known("a", map[string]string{"team": "blue"})
	require.NoError(t, a.writeCache(t.Context()))
	require.Empty(t, a.answers(t, scope, "r.one/app"))
	require.NotNil(t, a.answers(t, scope, "r.one/app"))
	require.Empty(t, a.server.asked())
	a.serves(holding(t, "r", 0, ofNamespace, map[string]string{"r.one": "1"}))
	require.Empty(t, a.watched, "nothing depends on its labels any more")
	require.NoError(t, a.writeCache(t.Context()))
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
	require.NoError(t, a.writeCache(t.Context()))

	next := &cachingAgent{testAgent: newTestAgent(t), dir: a.dir, writer: a.writer}
	next.config.Cache = a.writer
	unreadable := types.NamespacedName{Namespace: "imps-rendered", Name: impsync.RenderedName("uid-r")}
	next.rendered.Put(unreadable, renderedSecret{err: impsync.ErrFormatVersion})
	next.pod("a", "p", &pod{live: true})
	next.pod("new", "p", &pod{live: true})
	require.NoError(t, next.writeCache(t.Context()))
	require.Equal(t, []string{"1"}, next.answers(t, nodecache.InNamespace("a"), "r.one/app"))
	require.Equal(t, []string{"1"}, next.answers(t, nodecache.Node, "r.one/app"))
	require.NotNil(t, next.answers(t, nodecache.InNamespace("gone"), "r.one/app"))
	require.Empty(t, next.answers(t, nodecache.InNamespace("new"), "r.one/app"))
	require.NotNil(t, next.answers(t, nodecache.InNamespace("new"), "r.one/app"))

	next.rendered.Drop(unreadable, func(renderedSecret) bool { return true })
	require.NoError(t, next.writeCache(t.Context()))
	require.Empty(t, next.answers(t, nodecache.InNamespace("a"), "r.one/app"))
	require.Nil(t, next.answers(t, nodecache.InNamespace("gone"), "r.one/app"), "it has no Pod here any more")
}

// brokenCache takes nothing for a while.
type brokenCache struct {
	mu       sync.Mutex
	failures int
	sets     map[nodecache.Scope]int
}

func (b *brokenCache) Set(scope nodecache.Scope, _ []nodecache.Entry) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failures > 0 {
		b.failures--
		return errors.New("no space left on device")
	}
	b.sets[scope]++
	return nil
}

func (*brokenCache) Remove(nodecache.Scope) error { return nil }

func (b *brokenCache) Scopes() ([]nodecache.Scope, error) {
	return slices.Collect(maps.Keys(b.written())), nil
}

func (b *brokenCache) written() map[nodecache.Scope]int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return maps.Clone(b.sets)
}

func TestANodeCacheThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := newTestAgent(t)
		cache := &brokenCache{failures: 3, sets: map[nodecache.Scope]int{}}
		a.config.Cache = cache
		a.serves(holding(t, "r", 0, ofNode, map[string]string{"r.one": canary}))
		done := make(chan error, 1)
		ctx, stop := context.WithCancel(t.Context())
		go func() { done <- a.keepCache(ctx, ctx) }()
		synctest.Wait()
		require.Empty(t, cache.written())
		<-time.After(cacheSoonest + 2*cacheSoonest + 4*cacheSoonest)
		synctest.Wait()
		require.Equal(t, map[nodecache.Scope]int{nodecache.Node: 1}, cache.written())
		<-time.After(time.Hour)
		synctest.Wait()
		require.Equal(t, map[nodecache.Scope]int{nodecache.Node: 1}, cache.written(), "idle is silent")
		stop()
		require.NoError(t, <-done)
		require.Contains(t, a.log.String(), "no space left on device")
		require.NotContains(t, a.log.String(), canary)
	})
}
