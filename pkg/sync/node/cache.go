package node

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	"github.com/imps-node/imps/pkg/nodecache"
	impsync "github.com/imps-node/imps/pkg/sync"
)

const (
	// cachePass is how often the node cache is looked at whether or not anything has changed: somebody may have wiped it, or set the
	// clock. It costs some system calls for each record.
	cachePass = 30 * time.Second
	// Times after which a cache that cannot be written is tried again.
	cacheSoonest, cacheLongest = time.Second, time.Minute
	// cachePatience is how long the first report waits for the node cache.
	cachePatience = 5 * time.Second
)

// cache is the node cache, as keepCache knows it.
type cache struct {
	// writer is nil where the folder could not be opened, or is lost.
	writer *nodecache.Writer
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

// keepCache writes the node cache whenever it has changed what it is to hold, and looks at it now and then. It starts after the
// first lists are in, so that it never takes back what it has only not seen yet; and it takes nothing back when it ends.
func (a *Agent) keepCache(ctx, work context.Context) error {
	c := cache{holds: map[nodecache.Scope][]*selecting{}}
	defer func() {
		if c.writer != nil {
			_ = c.writer.Close()
		}
	}()
	pass := time.NewTicker(cachePass)
	defer pass.Stop()
	backoff := cacheSoonest
	for full := true; ; {
		pending, err := a.writeCache(work, &c, full)
		a.cacheWritten(err)
		if errors.Is(err, nodecache.ErrRemoved) {
			return err // a container gets the folder anew when it starts again
		}
		if pending == nil && err == nil {
			full, backoff = false, cacheSoonest
		} else {
			a.log.Debug("the node cache is not up to date, will try again", "error", impsync.Explain(errors.Join(pending, err)), "againIn", backoff.String())
			impsync.Pause(ctx, backoff)
			backoff = min(2*backoff, cacheLongest)
			a.cacheSoon()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-pass.C:
			full = true
		case <-a.cacheDirty:
		}
	}
}

// cacheWritten takes over what came of a try to write the node cache, and has it told where that is new.
func (a *Agent) cacheWritten(err error) {
	problem := ""
	if err != nil {
		problem = err.Error() // of the file system: it has paths in it
	}
	a.mu.Lock()
	was := a.cacheProblem
	a.cacheProblem = &problem
	a.mu.Unlock()
	if was == nil {
		close(a.cacheTried)
	}
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

// writeCache has the node cache hold what it should. Where it is not full, what is there already is taken for what was written.
// Pending is what is not known yet of namespaces; err, what is wrong with the cache.
func (a *Agent) writeCache(ctx context.Context, c *cache, full bool) (pending, err error) {
	wanted, unread := a.cacheContent()
	var unknown []error
	for _, name := range unread {
		if _, err := a.readNamespace(ctx, name); err != nil {
			unknown = append(unknown, err)
			continue
		}
		a.cacheSoon() // with what is known now
	}
	pending = errors.Join(unknown...)
	for range 2 {
		if c.writer == nil {
			if c.writer, err = nodecache.Open(a.config.CacheDir); err != nil {
				return pending, err
			}
			full = true
		}
		if err = a.fillCache(c, full, wanted, unread); !errors.Is(err, nodecache.ErrLost) {
			break
		}
		a.log.Warn("somebody has moved, removed or opened the node cache, writing it anew", "folder", a.config.CacheDir)
		_ = c.writer.Close()
		c.writer = nil
	}
	return pending, err
}

// fillCache brings each scope up to date.
func (a *Agent) fillCache(c *cache, full bool, wanted map[nodecache.Scope][]*selecting, unread []string) error {
	if t := a.serverTime.Load(); t != nil {
		c.writer.SetTime(t.said.Add(time.Since(t.heard)))
	}
	there, err := c.writer.Scopes()
	if err != nil {
		return err
	}
	// What an agent before has written stays as it is, as long as a rendered Secret cannot be read that it may be of.
	keep := len(a.unread()) > 0
	var failed error // the first: on a full disk there is one for each scope
	for _, scope := range there {
		_, ours := c.holds[scope]
		if _, ok := wanted[scope]; ok || keep && !ours || slices.Contains(unread, scope.Namespace) {
			continue
		}
		if err := c.writer.Remove(scope); err != nil {
			failed = cmp.Or(failed, err)
			continue
		}
		delete(c.holds, scope)
	}
	for scope, from := range wanted {
		holds, ours := c.holds[scope]
		if !full && ours && slices.Equal(holds, from) || keep && !ours && slices.Contains(there, scope) {
			continue
		}
		var entries []nodecache.Entry
		for _, s := range from {
			entries = append(entries, s.entries...)
		}
		skipped, err := c.writer.Set(scope, entries)
		if err != nil {
			failed = cmp.Or(failed, err)
			continue
		}
		if skipped > 0 && !slices.Equal(holds, from) {
			a.log.Warn("the node cache cannot hold some credentials, whose registries are too long, or which are too large", "namespace", scope.Namespace, "credentials", skipped)
		}
		c.holds[scope] = from
	}
	return failed
}

// cacheNeedsMetadata reports whether labels or annotations of a namespace decide what its Pods may pull. The caller holds the
// lock.
func (a *Agent) cacheNeedsMetadata() bool {
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
		case metadata && ns.known == nil && !a.config.Excluded.Matches(name):
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
