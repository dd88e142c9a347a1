package cluster

import (
	"maps"
	"slices"
	"time"

	"github.com/imps-node/imps/pkg/dockerconfig"
)

// expiryMargin is how long before its expiry a token is not used any more that nobody renews: a pull takes its time.
const expiryMargin = time.Minute

// given is credentials, of one source or merged. It is immutable.
type given struct {
	config dockerconfig.Config
	// expiries are when entries expire, by registry and the clock of AWS, those that do.
	expiries map[string]time.Time
}

// merge merges credentials in this order: for one registry the last wins.
func merge(all ...given) given {
	configs := make([]dockerconfig.Config, len(all))
	expiries := map[string]time.Time{}
	for i, g := range all {
		configs[i] = g.config
		for _, registry := range g.config.Registries() {
			delete(expiries, registry)
		}
		maps.Copy(expiries, g.expiries)
	}
	merged := dockerconfig.Merge(configs...)
	// Two spellings may be one registry.
	registries := merged.Registries()
	maps.DeleteFunc(expiries, func(registry string, _ time.Time) bool {
		_, ok := slices.BinarySearch(registries, registry)
		return !ok
	})
	return given{merged, expiries}
}

// only returns the credentials for some registries.
func (g given) only(wanted func(registry string) bool) given {
	entries := slices.DeleteFunc(g.config.Entries(), func(e dockerconfig.Entry) bool { return !wanted(e.Registry()) })
	config, err := dockerconfig.New(entries...)
	if err != nil {
		return given{} // some of what was valid together is valid
	}
	expiries := maps.Clone(g.expiries)
	maps.DeleteFunc(expiries, func(registry string, _ time.Time) bool { return !wanted(registry) })
	return given{config, expiries}
}

// unexpired returns the credentials that are still to be used.
func (g given) unexpired(now time.Time) given {
	if len(g.expiries) == 0 {
		return g
	}
	return g.only(func(registry string) bool {
		expires, ok := g.expiries[registry]
		return !ok || now.Before(expires.Add(-expiryMargin))
	})
}

// end is when the first of the credentials is not to be used any more, zero where they do not expire.
func (g given) end() time.Time {
	expires := earliest(g.expiries)
	if expires.IsZero() {
		return expires
	}
	return expires.Add(-expiryMargin)
}

func (g given) equal(other given) bool {
	return sameConfig(g.config, other.config) && maps.EqualFunc(g.expiries, other.expiries, time.Time.Equal)
}

// earliest is the first of some times, zero where there is none.
func earliest(times map[string]time.Time) (earliest time.Time) {
	for _, at := range times {
		earliest = first(earliest, at)
	}
	return earliest
}

// first is the first of two times, of which each may be zero.
func first(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}
