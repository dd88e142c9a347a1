package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// errNotSupported is about what the API has and this version does not do yet.
var errNotSupported = errors.New("not supported by this version of imps")

// source is the watch of one source Secret, shared by the resources that list it.
type source struct {
	mirror  *impsync.Mirror[sourceSecret]
	changed func()
	stop    context.CancelFunc
	users   map[types.UID]struct{}
}

// sourceSecret is what is kept of a source Secret.
type sourceSecret struct {
	config dockerconfig.Config
	// registries are those of an ECR source.
	registries []Registry
	err        error
}

func sourceOf(s *corev1.Secret, ecr ECRSources) sourceSecret {
	if s.Type == ecrSecretType {
		if ecr == nil {
			return sourceSecret{err: fmt.Errorf("sources of type %s are %w", ecrSecretType, errNotSupported)}
		}
		registries, err := ecr.Secret(s.Data)
		return sourceSecret{registries: registries, err: err}
	}
	config, _, err := dockerconfig.Parse(string(s.Type), s.Data)
	return sourceSecret{config: config, err: err}
}

// credential is what one entry of spec.registry.credentials gives.
type credential struct {
	// key is that of status.sourceSecretStatus.
	key string
	// given is what may be used now, also where an ECR source has an error.
	given
	// registries are those of an ECR source; inline says that the spec of the resource has them.
	registries []Registry
	inline     bool
	// lacking are those of them for which there is no token, for a reason that err tells. It is nil where it is not known
	// what the source asks for.
	lacking map[string]struct{}
	err     error
	// withdrawn: the source is gone or not allowed, so that nothing of it may be used any
	// more. Any other error leaves its last good entries in use.
	withdrawn bool
	// pending: it has not been read yet.
	pending bool
}

// readCredentials returns what the sources of a resource hold, in listed order, and makes
// sure that they are watched.
func (t *term) readCredentials(r *v1alpha1.ImagePullSecret) []credential {
	credentials := make([]credential, 0, len(r.Spec.Registry.Credentials))
	wanted := map[types.NamespacedName]struct{}{}
	keys := ecrKeys{}
	for _, entry := range r.Spec.Registry.Credentials {
		if entry.ECR != nil {
			c := credential{key: keys.of(*entry.ECR), inline: true}
			c.registries, c.err = t.registriesOf(*entry.ECR)
			c.withdrawn = errors.Is(c.err, errNotSupported)
			credentials = append(credentials, c)
			continue
		}
		key := types.NamespacedName{Namespace: entry.Namespace, Name: entry.Name}
		c := credential{key: key.Namespace + "." + key.Name}
		if err := t.sourceNamespaceAllowed(entry.Namespace); err != nil {
			c.err, c.withdrawn = err, true
		} else {
			wanted[key] = struct{}{}
			t.useSource(key, r.UID).read(key, &c)
		}
		credentials = append(credentials, c)
	}
	t.releaseSources(r.UID, wanted)
	return credentials
}

func (s *source) read(key types.NamespacedName, c *credential) {
	failure := s.mirror.Err()
	select {
	case <-s.mirror.Synced():
	default:
		c.err, c.pending = failure, failure == nil
		return
	}
	secret, ok := s.mirror.Get(key)
	switch {
	case apierrors.IsForbidden(failure):
		c.err = failure
	case !ok:
		c.err, c.withdrawn = errors.New("not found"), true
	default:
		c.given, c.registries, c.err = given{config: secret.config}, secret.registries, secret.err
	}
}

// newSource returns the watch of a source, which tells when what it reads has changed.
func newSource(key types.NamespacedName, core corev1client.SecretsGetter, ecr ECRSources, changed func(), log *slog.Logger) *source {
	secrets := core.Secrets(key.Namespace)
	return &source{users: map[types.UID]struct{}{}, changed: changed, mirror: impsync.NewMirror(impsync.MirrorConfig[sourceSecret]{
		Name: "source " + key.String(), Example: &corev1.Secret{}, Log: log,
		ListWatch: impsync.TypedListWatch(secrets.List, secrets.Watch, metav1.ListOptions{FieldSelector: metav1.ObjectNameField + "=" + key.Name}),
		Convert:   func(o runtime.Object) sourceSecret { return sourceOf(o.(*corev1.Secret), ecr) },
		OnChange:  func(types.NamespacedName, *sourceSecret, *sourceSecret) { changed() },
		OnError:   func(error) { changed() },
	})}
}

// run watches until ctx ends.
func (s *source) run(ctx context.Context) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-s.mirror.Synced():
			s.changed() // an absent Secret is no event
		case <-ctx.Done():
		}
	}()
	s.mirror.Run(ctx)
	<-done
}

// useSource returns the watch of a source, started if need be.
func (t *term) useSource(key types.NamespacedName, user types.UID) *source {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.sources[key]
	if s == nil {
		s = newSource(key, t.core, t.config.ECRSources, func() { t.sourceChanged(key) }, t.log)
		s.stop = t.background(s.run)
		t.sources[key] = s
	}
	s.users[user] = struct{}{}
	return s
}

// releaseSources ends the watches that only this resource used and no longer wants.
func (t *term) releaseSources(user types.UID, wanted map[types.NamespacedName]struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for key, s := range t.sources {
		if _, ok := wanted[key]; ok {
			continue
		}
		delete(s.users, user)
		if len(s.users) == 0 {
			s.stop()
			delete(t.sources, key)
		}
	}
}

func (t *term) sourceChanged(key types.NamespacedName) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.sources[key]; s != nil {
		for user := range s.users {
			t.resourceQueue.Add(user)
		}
	}
}

// resolution is what the sources of a resource give, merged.
type resolution struct {
	given
	// renewed are the tokens among it that sources gave which have given one for the same registry before, inline ones with
	// the identity that they have had.
	renewed given
	// lastGood is what to fall back on next time, by source.
	lastGood map[string]given
	// tokens are those in use, by the grant's ID.
	tokens map[string]Token
	// until is when credentials come to their end that nobody else watches over; zero where there are none.
	until time.Time
	// identityChanged: the coordinator is not who it was when it asked for a token.
	identityChanged bool
	// sources is status.sourceSecretStatus.
	sources map[string]string
	pending bool
	// empty: no source gave anything, now or before.
	empty bool
	// incomplete: a source fails of which nothing is known from before, or of one of its registries.
	incomplete bool
}

// resolve merges credentials in listed order: the last listed wins. What a source that fails cannot give now, it has given
// before, as long as that has not expired.
func resolve(credentials []credential, known *state, now time.Time) resolution {
	r := resolution{lastGood: map[string]given{}, sources: map[string]string{}}
	var all, renewed []given
	for _, c := range credentials {
		last, found := known.lastGood[c.key]
		g, good := c.given, true
		r.identityChanged = r.identityChanged || errors.Is(c.err, ErrIdentityChanged)
		switch {
		case c.pending:
			r.pending = true
			return r
		case c.err == nil:
			r.sources[c.key] = v1alpha1.SourceOK
		case c.withdrawn:
			r.sources[c.key], good = impsync.Explain(c.err), false
		default:
			before := last
			if c.lacking != nil {
				before = known.tokensBefore(credentials).only(func(registry string) bool { _, lacks := c.lacking[registry]; return lacks })
			}
			r.incomplete = r.incomplete || c.lacking == nil && !found || len(before.expiries) < len(c.lacking)
			before = before.unexpired(now)
			r.until = first(r.until, before.end())
			g = merge(g, before)
			good = found || len(g.config.Entries()) > 0
			r.sources[c.key] = impsync.Explain(c.err)
			switch expires := earliest(g.expiries); {
			case !expires.IsZero():
				r.sources[c.key] += "; its last good credentials stay in use until " + expires.UTC().Format(time.RFC3339)
			case good && len(last.expiries) == 0:
				r.sources[c.key] += "; its last good credentials stay in use"
			}
		}
		if good {
			all = append(all, g)
			renewed = append(renewed, c.renewed(g, last, known.tokens))
			r.lastGood[c.key] = g
		}
	}
	r.empty = len(all) == 0 && len(credentials) > 0
	r.given, r.renewed = merge(all...), merge(renewed...)
	return r
}

// tokensBefore is the last token for each registry, whichever source gave it, but for those that nothing may be used of any
// more. Whose turn it was in the list does not matter.
func (s *state) tokensBefore(credentials []credential) given {
	var all []given
	for _, key := range slices.Sorted(maps.Keys(s.lastGood)) {
		if !slices.ContainsFunc(credentials, func(c credential) bool { return c.key == key && c.withdrawn }) {
			all = append(all, s.lastGood[key])
		}
	}
	merged := merge(all...)
	return merged.only(func(registry string) bool { _, expires := merged.expiries[registry]; return expires })
}

// renewed returns of what a source gives what it has given before, in last, as far as it is tokens. An inline source
// is not the one that it was where the spec has another identity for it.
func (c *credential) renewed(g, last given, known map[string]Token) given {
	sameIdentity := map[string]bool{}
	for _, r := range c.registries {
		_, ok := known[r.Grant.ID()]
		sameIdentity[r.Host] = ok || !c.inline
	}
	return g.only(func(registry string) bool {
		_, is := g.expiries[registry]
		_, was := last.expiries[registry]
		return is && was && sameIdentity[registry]
	})
}

// failedSources returns "<source>: <error>" of each source that failed, sorted.
func failedSources(sources map[string]string) []string {
	var failed []string
	for key, state := range sources {
		if state != v1alpha1.SourceOK {
			failed = append(failed, key+": "+state)
		}
	}
	slices.Sort(failed)
	return failed
}
