package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// ecrSecretType is banzaicloud/imps's type of a Secret with AWS keys.
const ecrSecretType = "banzaicloud.io/aws-ecr-login-config"

// errNotSupported is about what the API has and this version does not do yet.
var errNotSupported = errors.New("not supported by this version of imps")

// source is the watch of one source Secret, shared by the resources that list it.
type source struct {
	mirror *impsync.Mirror[sourceSecret]
	stop   context.CancelFunc
	users  map[types.UID]struct{}
}

// sourceSecret is what is kept of a source Secret.
type sourceSecret struct {
	config dockerconfig.Config
	err    error
}

func sourceOf(s *corev1.Secret) sourceSecret {
	if s.Type == ecrSecretType {
		return sourceSecret{err: fmt.Errorf("sources of type %s are %w", ecrSecretType, errNotSupported)}
	}
	config, _, err := dockerconfig.Parse(string(s.Type), s.Data)
	return sourceSecret{config: config, err: err}
}

// credential is what one entry of spec.registry.credentials gives.
type credential struct {
	// key is that of status.sourceSecretStatus.
	key string
	// config is valid where err is nil.
	config dockerconfig.Config
	err    error
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
	for _, entry := range r.Spec.Registry.Credentials {
		if entry.ECR != nil {
			first := ""
			if len(entry.ECR.Registries) > 0 {
				first = entry.ECR.Registries[0]
			}
			credentials = append(credentials, credential{key: "ecr." + first, err: fmt.Errorf("ecr sources are %w", errNotSupported), withdrawn: true})
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
		c.config, c.err = secret.config, secret.err
	}
}

// useSource returns the watch of a source, started if need be.
func (t *term) useSource(key types.NamespacedName, user types.UID) *source {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.sources[key]
	if s == nil {
		s = &source{users: map[types.UID]struct{}{}}
		secrets := t.core.Secrets(key.Namespace)
		s.mirror = impsync.NewMirror(impsync.MirrorConfig[sourceSecret]{
			Name: "source " + key.String(), Example: &corev1.Secret{}, Log: t.log,
			ListWatch: impsync.TypedListWatch(secrets.List, secrets.Watch, metav1.ListOptions{FieldSelector: metav1.ObjectNameField + "=" + key.Name}),
			Convert:   func(o runtime.Object) sourceSecret { return sourceOf(o.(*corev1.Secret)) },
			OnChange:  func(types.NamespacedName, *sourceSecret, *sourceSecret) { t.sourceChanged(key) },
			OnError:   func(error) { t.sourceChanged(key) },
		})
		s.stop = t.background(func(ctx context.Context) {
			done := make(chan struct{})
			go func() {
				defer close(done)
				select {
				case <-s.mirror.Synced():
					t.sourceChanged(key) // an absent Secret is no event
				case <-ctx.Done():
				}
			}()
			s.mirror.Run(ctx)
			<-done
		})
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

// resolution is the merged credentials of a resource.
type resolution struct {
	config dockerconfig.Config
	// lastGood are the entries to fall back on next time, by source.
	lastGood map[string]dockerconfig.Config
	// sources is status.sourceSecretStatus.
	sources map[string]string
	pending bool
	// empty: no source gave anything, now or before.
	empty bool
	// incomplete: a source fails of which nothing is known from before.
	incomplete bool
}

// resolve merges credentials in listed order: the last listed wins. A source that fails
// keeps its last good entries.
func resolve(credentials []credential, lastGood map[string]dockerconfig.Config) resolution {
	r := resolution{lastGood: map[string]dockerconfig.Config{}, sources: map[string]string{}}
	var configs []dockerconfig.Config
	for _, c := range credentials {
		config, good := c.config, true
		switch {
		case c.pending:
			r.pending = true
			return r
		case c.err == nil:
			r.sources[c.key] = v1alpha1.SourceOK
		default:
			r.sources[c.key] = impsync.Explain(c.err)
			config, good = lastGood[c.key]
			if c.withdrawn {
				good = false
			} else if good {
				r.sources[c.key] += "; its last good credentials stay in use"
			} else {
				r.incomplete = true
			}
		}
		if good {
			configs = append(configs, config)
			r.lastGood[c.key] = config
		}
	}
	r.empty = len(configs) == 0 && len(credentials) > 0
	r.config = dockerconfig.Merge(configs...)
	return r
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
