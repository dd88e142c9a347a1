package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	"github.com/imps-node/imps/pkg/nodecache"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// Cache is what the kubelet's credential provider answers from: a nodecache.Writer.
type Cache interface {
	Set(scope nodecache.Scope, entries []nodecache.Entry) error
	Remove(scope nodecache.Scope) error
	// Scopes are those that it has, also of an agent before.
	Scopes() ([]nodecache.Scope, error)
}

// Times after which a cache that cannot be written is tried again.
const cacheSoonest, cacheLongest = time.Second, time.Minute

// cacheSoon notes that the node cache may need a write.
func (a *Agent) cacheSoon() {
	select {
	case a.cacheDirty <- struct{}{}:
	default:
	}
}

// keepCache writes the node cache whenever it has changed what it is to hold. It starts after the first lists are in, so that it
// never takes back what it has only not seen yet; and it takes nothing back when it ends.
func (a *Agent) keepCache(ctx, work context.Context) error {
	backoff := cacheSoonest
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.cacheDirty:
		}
		err := a.writeCache(work)
		if err == nil {
			backoff = cacheSoonest
			continue
		}
		a.log.Warn("cannot bring the node cache up to date, will try again", "error", impsync.Explain(err), "againIn", backoff.String())
		impsync.Pause(ctx, backoff)
		backoff = min(2*backoff, cacheLongest)
		a.cacheSoon()
	}
}

// writeCache has the node cache hold what it should.
func (a *Agent) writeCache(ctx context.Context) error {
	wanted, unread := a.cacheContent()
	var errs []error
	for _, name := range unread {
		if _, err := a.readNamespace(ctx, name); err != nil {
			errs = append(errs, err)
			continue
		}
		a.cacheSoon() // with what is known now
	}
	there, err := a.config.Cache.Scopes()
	if err != nil {
		return errors.Join(append(errs, fmt.Errorf("node cache: %w", err))...)
	}
	// What an agent before has written stays as it is, as long as a rendered Secret cannot be read that it may be of.
	keep := len(a.unread()) > 0
	for _, scope := range there {
		_, ok := wanted[scope]
		if ok || keep && !a.cached[scope] || slices.Contains(unread, scope.Namespace) {
			continue
		}
		if err := a.config.Cache.Remove(scope); err != nil {
			errs = append(errs, fmt.Errorf("node cache: %w", err))
			continue
		}
		delete(a.cached, scope)
	}
	for scope, entries := range wanted {
		if keep && !a.cached[scope] && slices.Contains(there, scope) {
			continue
		}
		if err := a.config.Cache.Set(scope, entries); err != nil {
			errs = append(errs, fmt.Errorf("node cache: %w", err))
			continue
		}
		a.cached[scope] = true
	}
	return errors.Join(errs...)
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

// cacheContent returns what the node cache is to hold: what every Pod of the node may use, and, for each namespace that has Pods
// here, what these may, be it nothing. Unread are namespaces of which that is not known yet.
func (a *Agent) cacheContent() (content map[nodecache.Scope][]nodecache.Entry, unread []string) {
	pods := map[string][]pod{}
	a.pods.Range(func(key types.NamespacedName, p pod) bool {
		pods[key.Namespace] = append(pods[key.Namespace], p)
		return true
	})
	a.mu.Lock()
	defer a.mu.Unlock()
	// The youngest first: of several for one registry the oldest resource's count, as of Secrets.
	var serving []*selecting
	for _, s := range a.active {
		if s.Kubelet != "" {
			serving = append(serving, s)
		}
	}
	slices.SortFunc(serving, func(x, y *selecting) int { return y.Resource.Compare(x.Resource) })
	metadata := a.cacheNeedsMetadata()
	content = map[nodecache.Scope][]nodecache.Entry{nodecache.Node: {}}
	for name, ns := range a.namespaces {
		switch {
		case ns.live == 0:
		case metadata && ns.known == nil && !a.config.Excluded.Matches(name):
			unread = append(unread, name)
		default:
			content[nodecache.InNamespace(name)] = []nodecache.Entry{}
		}
	}
	for _, s := range serving {
		entries := s.entries()
		if s.Kubelet == v1alpha1.KubeletScopeNode {
			content[nodecache.Node] = append(content[nodecache.Node], entries...)
			continue
		}
		for scope := range content {
			if scope == nodecache.Node || a.config.Excluded.Matches(scope.Namespace) {
				continue
			}
			ns := a.namespaces[scope.Namespace]
			if s.selects(scope.Namespace, ns.known, pods[scope.Namespace]) && (ns.known == nil || !ns.known.terminating) {
				content[scope] = append(content[scope], entries...)
			}
		}
	}
	return content, unread
}

// entries are the credentials of a resource as the node cache takes them: those with a user and a password, as kubelets take no
// others from a provider.
func (s *selecting) entries() []nodecache.Entry {
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
