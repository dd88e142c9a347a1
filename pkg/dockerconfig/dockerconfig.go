// Package dockerconfig is the one place that knows docker config JSON: it parses the two forms that a Secret can
// hold, merges several configs, renders one canonical form, and tells which credentials a kubelet uses for an image.
//
// The kubelet decides what a docker config means, so its rules are the rules here (Kubernetes 1.36,
// pkg/credentialprovider/config.go and keyring.go). One line divides bad input:
//   - what makes a kubelet refuse a whole Secret is an error, and the error names the registry. A kubelet that
//     refuses one pull Secret of a pod fails every pull of that pod, so such a Secret must never be rendered;
//   - what a kubelet passes over silently is left out, and Parse reports it in a note.
//
// The package is pure: no I/O, no Kubernetes types, no logging. No error and no note holds a credential.
package dockerconfig

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"
)

// Limits on what is read and written.
const (
	// MaxBytes bounds a docker config, parsed or rendered: the API server takes no larger Secret (k8s.io/api/core/v1
	// MaxSecretSize).
	MaxBytes = 1 << 20
	// MaxEntries bounds the registries of one source; more, with names and passwords of a usual length, would not fit
	// into MaxBytes.
	MaxEntries = 10_000
	// MaxKeyBytes bounds a registry's key: a host name has at most 253 bytes, a repository path 255.
	MaxKeyBytes = 1024
)

// Classes of error. None of them goes away by itself: each needs a changed input.
var (
	// ErrSecretType: the Secret is of another type, or has no value under that type's key.
	ErrSecretType = errors.New("not a docker config Secret")
	// ErrTooLarge: a limit of this package is exceeded.
	ErrTooLarge = errors.New("docker config too large")
	// ErrMalformed: the content is not what the type says, and a kubelet would refuse it.
	ErrMalformed = errors.New("malformed docker config")
	// ErrRegistry: a key can match no image.
	ErrRegistry = errors.New("not a registry")
	// ErrImage: an image reference that a kubelet refuses.
	ErrImage = errors.New("invalid image reference")
)

// Entry is the credentials for one registry. Every field is optional but Key and one credential.
type Entry struct {
	// Key is the registry as its source spells it, such as "https://index.docker.io/v1/", "ghcr.io/acme" or
	// "*.dkr.ecr.*.amazonaws.com". It is no credential, but people put "user:password@host" there; print Registry.
	Key      Sensitive
	Username Sensitive
	Password Sensitive
	// IdentityToken and RegistryToken are carried for other readers of the Secret; kubelets read neither.
	IdentityToken Sensitive
	RegistryToken Sensitive
	Email         Sensitive

	// normal is Normalize(Key), set for every entry of a Config.
	normal Sensitive
}

// Registry returns Key fit for printing: without anything that could be user information, and bounded.
func (e Entry) Registry() string { return printable(e.Key.Reveal()) }

// Equal reports whether both have the same key and the same credentials.
func (e Entry) Equal(other Entry) bool {
	return e.Key.Equal(other.Key) &&
		e.Username.Equal(other.Username) &&
		e.Password.Equal(other.Password) &&
		e.IdentityToken.Equal(other.IdentityToken) &&
		e.RegistryToken.Equal(other.RegistryToken) &&
		e.Email.Equal(other.Email)
}

// hasBasic reports whether there is a username or a password: what a kubelet sends.
func (e Entry) hasBasic() bool { return !e.Username.IsZero() || !e.Password.IsZero() }

// hasToken reports whether there is a token, which kubelets do not send.
func (e Entry) hasToken() bool { return !e.IdentityToken.IsZero() || !e.RegistryToken.IsZero() }

// colonInUsername: such a pair cannot be written as auth, whose first colon ends the username.
func (e Entry) colonInUsername() bool { return strings.Contains(e.Username.Reveal(), ":") }

// isText: only then can JSON strings hold the pair. Other bytes come from, and fit into, auth alone.
func (e Entry) isText() bool {
	return utf8.ValidString(e.Username.Reveal()) && utf8.ValidString(e.Password.Reveal())
}

// fits reports whether a docker config can hold the entry. What was parsed always fits.
func (e Entry) fits() bool {
	for _, s := range []Sensitive{e.Key, e.IdentityToken, e.RegistryToken, e.Email} {
		if !utf8.ValidString(s.Reveal()) {
			return false
		}
	}
	return e.isText() || !e.colonInUsername()
}

// identity is what makes two keys one registry when configs are merged. See Merge.
func (e Entry) identity() string {
	if normal := e.normal.Reveal(); normal != hubIndex {
		return normal
	}
	return hub
}

// Config holds the credentials of one source, or of several merged. It never changes, may be shared between
// goroutines, and prints nothing of what it holds. The zero value is empty. Two configs are the same if they render
// the same.
type Config struct {
	entries []Entry // sorted by compareEntries, keys unique
}

// New returns a config of these entries; of two with the same key the last wins. It is for credentials that come from
// elsewhere than a docker config, such as a token exchange. An entry that no image can match (ErrRegistry), without a
// credential or that JSON cannot hold (ErrMalformed), and more than the limits allow (ErrTooLarge) are errors.
func New(entries ...Entry) (Config, error) {
	if len(entries) > MaxEntries {
		return Config{}, fmt.Errorf("%w: %d registries, the limit is %d", ErrTooLarge, len(entries), MaxEntries)
	}
	byKey := make(map[string]Entry, len(entries))
	for _, e := range entries {
		key := e.Key.Reveal()
		if len(key) > MaxKeyBytes {
			return Config{}, fmt.Errorf("%w: registry %q has %d bytes, the limit is %d",
				ErrTooLarge, e.Registry(), len(key), MaxKeyBytes)
		}
		normal, err := Normalize(key)
		if err != nil {
			return Config{}, err
		}
		e.normal = NewSensitive(normal)
		switch {
		case !e.hasBasic() && !e.hasToken():
			return Config{}, fmt.Errorf("%w: registry %q has no credential", ErrMalformed, e.Registry())
		case !e.fits():
			return Config{}, fmt.Errorf("%w: registry %q has bytes that are not UTF-8 where JSON has no place for them",
				ErrMalformed, e.Registry())
		}
		byKey[key] = e
	}
	return newConfig(slices.Collect(maps.Values(byKey))), nil
}

// newConfig takes over entries that have their normal form, each with another key.
func newConfig(entries []Entry) Config {
	slices.SortFunc(entries, compareEntries)
	return Config{entries: entries}
}

// compareEntries puts entries into the order in which a kubelet looks at them: normalised keys backwards, so that a
// longer path comes before a shorter one and a literal label before "*" (keyring.go, Add). Several spellings of one
// normalised key a kubelet keeps in no particular order; here they are sorted.
func compareEntries(a, b Entry) int {
	if order := cmp.Compare(b.normal.Reveal(), a.normal.Reveal()); order != 0 {
		return order
	}
	return cmp.Compare(a.Key.Reveal(), b.Key.Reveal())
}

// Entries returns the entries in the order in which a kubelet looks at them. The slice is the caller's.
func (c Config) Entries() []Entry { return slices.Clone(c.entries) }

// Registries returns the keys as written, sorted and fit for printing; see Entry.Registry.
func (c Config) Registries() []string {
	registries := make([]string, len(c.entries))
	for i, e := range c.entries {
		registries[i] = e.Registry()
	}
	slices.Sort(registries)
	return registries
}

// Merge returns the credentials of all configs. Of two configs that name one registry, the last listed wins, always.
//
// Keys stay as written, and two spellings are one registry if a kubelet makes the same of them (Normalize):
// "https://quay.io/v1/" and "quay.io". Docker Hub's two hosts are one registry as well: a kubelet turns to
// index.docker.io for the images of docker.io only where nothing else matches, so with both in one Secret an earlier
// docker.io would always win over a later index.docker.io. Different paths, ports and globs are different registries,
// also where they match the same image.
//
// Several spellings of one registry inside one config stay side by side, and win or lose together: a kubelet tries
// them all.
func Merge(configs ...Config) Config {
	winner := make(map[string]int)
	total := 0
	for i, c := range configs {
		for _, e := range c.entries {
			winner[e.identity()] = i
		}
		total += len(c.entries)
	}
	merged := make([]Entry, 0, total)
	for i, c := range configs {
		for _, e := range c.entries {
			if winner[e.identity()] == i {
				merged = append(merged, e)
			}
		}
	}
	return newConfig(merged)
}

// printable returns a key or a field name fit for errors, notes and logs. User information ends at an "@", but a
// password may hold any character before it, so all up to the last "@" goes; a query or fragment goes too.
func printable(key string) string {
	key = key[strings.LastIndexByte(key, '@')+1:]
	if i := strings.IndexAny(key, "?#"); i >= 0 {
		key = key[:i]
	}
	return bounded(key)
}

// bounded returns text from outside cut to a length that fits into an error.
func bounded(text string) string {
	const limit = 128
	if len(text) <= limit {
		return text
	}
	return strings.ToValidUTF8(text[:limit], "") + "..."
}
