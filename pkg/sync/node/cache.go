package node

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net/http"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	"github.com/imps-node/imps/pkg/nodecache"
)

const (
	// cachePass is how often the node cache is looked at whether or not anything has changed: somebody may have wiped it, or set the
	// clock. It costs some system calls for each record.
	cachePass = 30 * time.Second
	// Times after which a cache that cannot be written is tried again, and one that another agent writes: until then nobody is there
	// for the provider to wait for.
	cacheSoonest, cacheLongest, cacheLocked = time.Second, time.Minute, 200 * time.Millisecond
)

// cache is the node cache, as keepCache knows it.
type cache struct {
	// writer is nil where the folder could not be opened, or is lost.
	writer *nodecache.Writer
	// told is what the writer knows of the API server's time. It goes on by a clock that a suspended machine does not stop.
	told *serverTime
	// holds are the scopes that this agent has written, with the resources that have given each what it holds.
	holds map[nodecache.Scope][]*selecting
}

// serverTime is what the API server took for the time when it answered.
type serverTime struct{ said, heard time.Time }

// dated has the agent learn from every answer of the API server what time it is: credentials must not outlive their expiry
// where the clock of this machine is behind.
func (a *Agent) dated(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		response, err := next.RoundTrip(r)
		if err == nil {
			if said, err := http.ParseTime(response.Header.Get("Date")); err == nil {
				a.serverTime.Store(&serverTime{said, time.Now()})
			}
		}
		return response, err
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (r roundTripper) RoundTrip(request *http.Request) (*http.Response, error) { return r(request) }

// cacheSoon notes that the node cache may need a write.
func (a *Agent) cacheSoon() {
	select {
	case a.cacheDirty <- struct{}{}:
	default:
	}
}

// keepCache writes the node cache whenever it has changed what it is to hold, and looks at it now and then. It opens it at once, so
// that the provider waits for what is new, and writes after the first lists are in, so that it never takes back what it has only not
// seen yet; and it takes nothing back when it ends.
func (a *Agent) keepCache(ctx context.Context) error {
	var c cache
	defer c.close()
	pass := time.NewTicker(cachePass)
	defer pass.Stop()
	retry := time.NewTimer(0)
	defer retry.Stop()
	ready, backoff := a.ready, cacheSoonest
	for full := true; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-ready:
			ready = nil // once
		case <-retry.C:
		case <-pass.C:
			full = true
		case <-a.cacheDirty:
		}
		err := a.openCache(&c)
		if a.Ready() == nil {
			if err == nil {
				err = a.writeCache(&c, full)
			}
			a.cacheWritten(err)
		}
		switch {
		case err == nil:
			full, backoff = false, cacheSoonest
		case errors.Is(err, nodecache.ErrRemoved):
			return err // a container gets the folder anew when it starts again
		case errors.Is(err, nodecache.ErrLocked):
			retry.Reset(cacheLocked)
		default:
			retry.Reset(backoff)
			backoff = min(2*backoff, cacheLongest)
		}
	}
}

func (c *cache) close() {
	if c.writer != nil {
		_ = c.writer.Close()
	}
	c.writer = nil
}

// openCache opens the folder, if it is not open.
func (a *Agent) openCache(c *cache) (err error) {
	if c.writer == nil {
		c.writer, err = nodecache.Open(a.config.CacheDir)
		c.holds, c.told = map[nodecache.Scope][]*selecting{}, nil
	}
	return err
}

// cacheWritten takes over what came of a try to write the node cache, and has it told where that is new.
func (a *Agent) cacheWritten(err error) {
	problem := ""
	if err != nil {
		problem = err.Error() // of the file system
	}
	a.mu.Lock()
	was := a.cacheProblem
	a.cacheProblem = &problem
	a.mu.Unlock()
	switch {
	case was != nil && *was == problem:
		return
	case err != nil:
		a.log.Warn("cannot write the node cache, will go on trying", "error", problem)
	default:
		a.log.Info("the node cache is up to date")
	}
	a.dirty()
}

// writeCache has the node cache hold what it should, as far as that is known. Where it is not full, what is there already is taken
// for what was written.
func (a *Agent) writeCache(c *cache, full bool) error {
	err := a.fillCache(c, full)
	if !errors.Is(err, nodecache.ErrLost) {
		return err
	}
	a.log.Warn("somebody has moved, removed or opened the node cache, writing it anew", "folder", a.config.CacheDir)
	c.close()
	if err = a.openCache(c); err != nil {
		return err
	}
	return a.fillCache(c, true)
}

// fillCache brings each scope up to date. An error is the first: on a full disk there is one for each scope.
func (a *Agent) fillCache(c *cache, full bool) error {
	if t := a.serverTime.Load(); t != c.told {
		c.writer.SetTime(t.said.Add(time.Since(t.heard)))
		c.told = t
	}
	there, err := c.writer.Scopes()
	if err != nil {
		return err
	}
	wanted, unread := a.cacheContent()
	// What an agent before has written stays, as long as a rendered Secret cannot be read that it may be of.
	keep := len(a.unread()) > 0
	ours := func(scope nodecache.Scope) bool { _, ok := c.holds[scope]; return ok }
	var failed error
	for _, scope := range there {
		if _, ok := wanted[scope]; ok || keep && !ours(scope) || slices.Contains(unread, scope.Namespace) {
			continue
		}
		failed = cmp.Or(failed, c.writer.Remove(scope))
	}
	for scope := range c.holds {
		if _, ok := wanted[scope]; !ok && !slices.Contains(unread, scope.Namespace) {
			delete(c.holds, scope)
		}
	}
	// New ones first: Pods wait for them.
	scopes := slices.SortedFunc(maps.Keys(wanted), func(x, y nodecache.Scope) int {
		switch {
		case !ours(x) && ours(y):
			return -1
		case ours(x) && !ours(y):
			return 1
		default:
			return cmp.Compare(x.Namespace, y.Namespace)
		}
	})
	for _, scope := range scopes {
		from := wanted[scope]
		same := ours(scope) && slices.Equal(c.holds[scope], from)
		if same && (!full || c.writer.Holds(scope)) {
			continue
		}
		var entries []nodecache.Entry
		for _, s := range from {
			entries = append(entries, s.entries...)
		}
		if keep && slices.Contains(there, scope) && !ours(scope) {
			_, err := c.writer.Add(scope, entries)
			failed = cmp.Or(failed, err)
			continue
		}
		skipped, err := c.writer.Set(scope, entries)
		if err != nil {
			failed = cmp.Or(failed, err)
			delete(c.holds, scope)
			continue
		}
		c.holds[scope] = from
		if skipped > 0 && !same {
			a.log.Warn("the node cache cannot hold some credentials, whose registries are too long, or which are too large", "namespace", scope.Namespace, "credentials", skipped)
		}
	}
	return failed
}

// cacheWants reports whether it is not known yet what the Pods of a namespace may pull, where metadata decides. The caller holds the
// lock.
func (a *Agent) cacheWants(name string, ns *namespace, metadata bool) bool {
	return metadata && ns != nil && ns.live > 0 && ns.known == nil && !a.config.Excluded.Matches(name)
}

// cacheNeedsMetadata reports whether labels or annotations of namespaces decide what their Pods may pull. The caller holds the
// lock.
func (a *Agent) cacheNeedsMetadata() bool {
	if a.config.CacheDir == "" {
		return false
	}
	for _, s := range a.active {
		if s.Kubelet == v1alpha1.KubeletScopeNamespace && s.selection.HasMetadataRules() {
			return true
		}
	}
	return false
}

// cacheContent returns whose credentials the node cache is to hold, the youngest resource first: for every Pod of the node, and,
// for each namespace that has Pods here, for these, be it nothing. Unread are namespaces of which that is not known yet.
func (a *Agent) cacheContent() (content map[nodecache.Scope][]*selecting, unread []string) {
	pods := map[string][]pod{}
	a.pods.Range(func(key types.NamespacedName, p pod) bool {
		pods[key.Namespace] = append(pods[key.Namespace], p)
		return true
	})
	a.mu.Lock()
	defer a.mu.Unlock()
	// Of several for one registry the last one's count: the oldest resource's, as of Secrets.
	var serving []*selecting
	for _, s := range a.active {
		if s.Kubelet != "" {
			serving = append(serving, s)
		}
	}
	slices.SortFunc(serving, func(x, y *selecting) int { return y.Resource.Compare(x.Resource) })
	metadata := a.cacheNeedsMetadata()
	content = map[nodecache.Scope][]*selecting{nodecache.Node: nil}
	for name, ns := range a.namespaces {
		switch {
		case ns.live == 0:
		case a.cacheWants(name, ns, metadata):
			unread = append(unread, name)
		default:
			content[nodecache.InNamespace(name)] = nil
		}
	}
	for _, s := range serving {
		if s.Kubelet == v1alpha1.KubeletScopeNode {
			content[nodecache.Node] = append(content[nodecache.Node], s)
			continue
		}
		for scope := range content {
			if scope == nodecache.Node || a.config.Excluded.Matches(scope.Namespace) {
				continue
			}
			ns := a.namespaces[scope.Namespace]
			if s.selects(scope.Namespace, ns.known, pods[scope.Namespace]) && (ns.known == nil || !ns.known.terminating) {
				content[scope] = append(content[scope], s)
			}
		}
	}
	return content, unread
}

// cacheEntries are the credentials of a resource as the node cache takes them: those with a user or a password, as kubelets take
// no others from a provider.
func (s *selecting) cacheEntries() []nodecache.Entry {
	var entries []nodecache.Entry
	for _, e := range s.credentials.Entries() {
		key, err := dockerconfig.Normalize(e.Key.Reveal())
		if err != nil || e.Username.IsZero() && e.Password.IsZero() {
			continue
		}
		entries = append(entries, nodecache.Entry{Key: key, Username: e.Username, Password: e.Password, Expires: s.Expiries[e.Registry()]})
	}
	return entries
}
