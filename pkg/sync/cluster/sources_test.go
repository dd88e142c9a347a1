package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

func TestResolve(t *testing.T) {
	t.Parallel()
	good := func(key string, registries ...string) credential {
		return credential{key: key, given: given{config: configOf(t, registries...)}}
	}
	broken := func(key string) credential { return credential{key: key, err: errors.New("not base64")} }
	gone := func(key string) credential {
		return credential{key: key, err: errors.New("not found"), withdrawn: true}
	}
	const kept = "; its last good credentials stay in use"

	tests := map[string]struct {
		credentials []credential
		lastGood    map[string][]string
		config      []string
		sources     map[string]string
		remembered  map[string][]string
		failed      bool
		empty       bool
		incomplete  bool
	}{
		"no sources are no failure, and not empty": {},
		"one source": {
			credentials: []credential{good("a", "r.io=1")},
			config:      []string{"r.io=1"}, sources: map[string]string{"a": "Ok"}, remembered: map[string][]string{"a": {"r.io=1"}},
		},
		"the last listed wins a registry, and the others add theirs (B6)": {
			credentials: []credential{good("z", "r.io=1", "z.io=1"), good("a", "r.io=2", "a.io=2"), good("m", "r.io=3")},
			config:      []string{"a.io=2", "r.io=3", "z.io=1"},
			sources:     map[string]string{"z": "Ok", "a": "Ok", "m": "Ok"},
			remembered:  map[string][]string{"z": {"r.io=1", "z.io=1"}, "a": {"a.io=2", "r.io=2"}, "m": {"r.io=3"}},
		},
		"the same in another order": {
			credentials: []credential{good("m", "r.io=3"), good("a", "r.io=2", "a.io=2"), good("z", "r.io=1", "z.io=1")},
			config:      []string{"a.io=2", "r.io=1", "z.io=1"},
			sources:     map[string]string{"z": "Ok", "a": "Ok", "m": "Ok"},
			remembered:  map[string][]string{"z": {"r.io=1", "z.io=1"}, "a": {"a.io=2", "r.io=2"}, "m": {"r.io=3"}},
		},
		"a source without registries is read, and nothing is empty": {
			credentials: []credential{good("a")},
			sources:     map[string]string{"a": "Ok"}, remembered: map[string][]string{"a": nil},
		},
		"a source that fails keeps its last good entries, in its place (B5)": {
			credentials: []credential{good("a", "r.io=1"), broken("b"), good("c", "s.io=3")},
			lastGood:    map[string][]string{"a": {"r.io=old"}, "b": {"r.io=2", "s.io=2"}},
			config:      []string{"r.io=2", "s.io=3"},
			sources:     map[string]string{"a": "Ok", "b": "not base64" + kept, "c": "Ok"},
			remembered:  map[string][]string{"a": {"r.io=1"}, "b": {"r.io=2", "s.io=2"}, "c": {"s.io=3"}},
			failed:      true,
		},
		"all fail: the last good entries of all stay": {
			credentials: []credential{broken("a"), broken("b")},
			lastGood:    map[string][]string{"a": {"r.io=1"}, "b": {"s.io=2"}},
			config:      []string{"r.io=1", "s.io=2"},
			sources:     map[string]string{"a": "not base64" + kept, "b": "not base64" + kept},
			remembered:  map[string][]string{"a": {"r.io=1"}, "b": {"s.io=2"}},
			failed:      true,
		},
		"a source that fails of which nothing is known is incomplete": {
			credentials: []credential{good("a", "r.io=1"), broken("b")},
			config:      []string{"r.io=1"}, sources: map[string]string{"a": "Ok", "b": "not base64"}, remembered: map[string][]string{"a": {"r.io=1"}},
			failed: true, incomplete: true,
		},
		"the only source fails, and nothing is known of it": {
			credentials: []credential{broken("a")},
			sources:     map[string]string{"a": "not base64"}, failed: true, empty: true, incomplete: true,
		},
		"a source that is gone goes, and is not remembered": {
			credentials: []credential{good("a", "r.io=1"), gone("b")},
			lastGood:    map[string][]string{"a": {"r.io=1"}, "b": {"r.io=2", "s.io=2"}},
			config:      []string{"r.io=1"}, sources: map[string]string{"a": "Ok", "b": "not found"}, remembered: map[string][]string{"a": {"r.io=1"}},
			failed: true,
		},
		"the only source is gone": {
			credentials: []credential{gone("a")},
			lastGood:    map[string][]string{"a": {"r.io=1"}},
			sources:     map[string]string{"a": "not found"}, failed: true, empty: true,
		},
		"a source that is no longer listed is forgotten": {
			credentials: []credential{good("a", "r.io=1")},
			lastGood:    map[string][]string{"a": {"r.io=0"}, "b": {"s.io=2"}},
			config:      []string{"r.io=1"}, sources: map[string]string{"a": "Ok"}, remembered: map[string][]string{"a": {"r.io=1"}},
		},
		"an error of the API server is told in short": {
			credentials: []credential{{key: "a", err: fmt.Errorf("x: %w", apierrors.NewNotFound(corev1.Resource("secrets"), "hub"))}},
			lastGood:    map[string][]string{"a": {"r.io=1"}},
			config:      []string{"r.io=1"}, sources: map[string]string{"a": `secrets "hub" not found` + kept}, remembered: map[string][]string{"a": {"r.io=1"}},
			failed: true,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lastGood := map[string]given{}
			for key, registries := range test.lastGood {
				lastGood[key] = given{config: configOf(t, registries...)}
			}
			r := resolve(test.credentials, &state{lastGood: lastGood}, noon)
			require.Equal(t, test.config, plain(r.config))
			if test.sources == nil {
				test.sources = map[string]string{}
			}
			require.Equal(t, test.sources, r.sources)
			remembered := map[string][]string{}
			for key, g := range r.lastGood {
				remembered[key] = plain(g.config)
			}
			if test.remembered == nil {
				test.remembered = map[string][]string{}
			}
			require.Equal(t, test.remembered, remembered)
			require.Equal(t, test.failed, len(failedSources(r.sources)) > 0)
			require.Equal(t, test.empty, r.empty)
			require.Equal(t, test.incomplete, r.incomplete)
			require.False(t, r.pending)
			require.Len(t, lastGood, len(test.lastGood), "what was remembered is not changed")
		})
	}
}

func TestResolveWaitsUntilEverySourceWasRead(t *testing.T) {
	t.Parallel()
	a := credential{key: "a", given: given{config: configOf(t, "r.io=1")}}
	pending := credential{key: "b", pending: true}
	for _, credentials := range [][]credential{{pending}, {a, pending}, {pending, a}} {
		require.True(t, resolve(credentials, &state{}, noon).pending)
	}
}

func TestFailedSourcesAreSorted(t *testing.T) {
	t.Parallel()
	require.Equal(t, []string{"a.x: not found", "c.x: bad"}, failedSources(map[string]string{"c.x": "bad", "b.x": "Ok", "a.x": "not found"}))
	require.Empty(t, failedSources(nil))
}

func TestSourceOf(t *testing.T) {
	t.Parallel()
	secret := func(secretType corev1.SecretType, key, value string) *corev1.Secret {
		return &corev1.Secret{Type: secretType, Data: map[string][]byte{key: []byte(value)}}
	}
	read := sourceOf(secret(corev1.SecretTypeDockerConfigJson, corev1.DockerConfigJsonKey, `{"auths":{"r.io":{"username":"u","password":"1"}}}`), nil)
	require.NoError(t, read.err)
	require.Equal(t, []string{"r.io=1"}, plain(read.config))
	read = sourceOf(secret(corev1.SecretTypeDockercfg, corev1.DockerConfigKey, `{"r.io":{"username":"u","password":"1"}}`), nil)
	require.NoError(t, read.err)
	require.Equal(t, []string{"r.io=1"}, plain(read.config))

	for name, s := range map[string]*corev1.Secret{
		"IMPS's AWS keys": secret(ecrSecretType, "secretKey", canary),
		"another type":    secret(corev1.SecretTypeOpaque, corev1.DockerConfigJsonKey, canary),
		"no key":          secret(corev1.SecretTypeDockerConfigJson, canary, canary),
		"no JSON":         secret(corev1.SecretTypeDockerConfigJson, corev1.DockerConfigJsonKey, canary),
		"no base64":       secret(corev1.SecretTypeDockerConfigJson, corev1.DockerConfigJsonKey, `{"auths":{"r.io":{"auth":"`+canary+`!"}}}`),
	} {
		read := sourceOf(s, nil)
		require.Error(t, read.err, name)
		require.Empty(t, read.config.Entries(), name)
		requireSilent(t, read.err.Error())
	}
	require.ErrorIs(t, sourceOf(secret(ecrSecretType, "", ""), nil).err, errNotSupported)
	requireSilent(t, fmt.Sprintf("%v %+v %#v", read, read, resolve([]credential{{key: "a", given: given{config: configOf(t, "r.io="+canary)}}}, &state{}, noon)))
}

// sourceMirror is the watch of a source that has read these Secrets and lost its server.
func sourceMirror(t *testing.T, term *term, secrets ...corev1.Secret) *source {
	t.Helper()
	return &source{users: map[types.UID]struct{}{}, mirror: synced(t, sourceConfig(term), &corev1.SecretList{Items: secrets})}
}

func TestReadCredentials(t *testing.T) {
	t.Parallel()
	term := newTestTerm(t)
	in := func(name string) types.NamespacedName {
		return types.NamespacedName{Namespace: "registry-access", Name: name}
	}
	meta := func(name string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Namespace: "registry-access", Name: name}
	}
	stopped := map[string]bool{}
	term.sources[in("hub")] = sourceMirror(t, term, corev1.Secret{
		ObjectMeta: meta("hub"), Type: corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(`{"auths":{"r.io":{"username":"u","password":"1"}}}`)},
	})
	term.sources[in("bad")] = sourceMirror(t, term, corev1.Secret{ObjectMeta: meta("bad"), Type: corev1.SecretTypeOpaque})
	term.sources[in("absent")] = sourceMirror(t, term)
	term.sources[in("unread")] = &source{users: map[types.UID]struct{}{}, mirror: impsync.NewMirror(sourceConfig(term))}
	term.sources[in("unlisted")] = sourceMirror(t, term)
	term.sources[in("shared")] = sourceMirror(t, term)
	for key, s := range term.sources {
		s.stop = func() { stopped[key.Name] = true }
	}
	term.sources[in("unlisted")].users["uid-a"] = struct{}{}
	term.sources[in("shared")].users["uid-a"] = struct{}{}
	term.sources[in("shared")].users["uid-b"] = struct{}{}

	r := resource(t, "a", 0, `{}`)
	r.Spec.Registry.Credentials = []v1alpha1.CredentialSource{
		{Namespace: "registry-access", Name: "hub"},
		{Namespace: "kube-system", Name: "hub"},
		{ECR: &v1alpha1.ECRSource{Registries: []string{"1.dkr.ecr.eu-central-1.amazonaws.com", "2.dkr.ecr.eu-central-1.amazonaws.com"}}},
		{Namespace: "registry-access", Name: "bad"},
		{Namespace: "registry-access", Name: "absent"},
		{Namespace: "registry-access", Name: "unread"},
		{ECR: &v1alpha1.ECRSource{}},
	}
	got := term.readCredentials(r)
	require.Len(t, got, len(r.Spec.Registry.Credentials), "in listed order")

	require.Equal(t, "registry-access.hub", got[0].key)
	require.NoError(t, got[0].err)
	require.Equal(t, []string{"r.io=1"}, plain(got[0].config))

	require.Equal(t, "kube-system.hub", got[1].key)
	require.ErrorContains(t, got[1].err, "--source-namespaces (registry-access): add it to the chart's value sourceNamespaces")
	require.True(t, got[1].withdrawn, "what is not allowed is not used, whatever it was before")

	require.Equal(t, "ecr.1.dkr.ecr.eu-central-1.amazonaws.com", got[2].key)
	require.ErrorIs(t, got[2].err, errNotSupported)

	require.Equal(t, "registry-access.bad", got[3].key)
	require.Error(t, got[3].err)
	require.False(t, got[3].withdrawn, "it may be good again")

	require.EqualError(t, got[4].err, "not found")
	require.True(t, got[4].withdrawn)

	require.True(t, got[5].pending)
	require.NoError(t, got[5].err)
	require.Equal(t, "ecr.", got[6].key)

	for _, name := range []string{"hub", "bad", "absent", "unread"} {
		require.Contains(t, term.sources[in(name)].users, types.UID("uid-a"), name)
	}
	require.NotContains(t, term.sources, types.NamespacedName{Namespace: "kube-system", Name: "hub"}, "it is not even watched")
	require.Equal(t, map[string]bool{"unlisted": true}, stopped, "watches that nobody needs any more end")
	require.NotContains(t, term.sources, in("unlisted"))
	require.Equal(t, map[types.UID]struct{}{"uid-b": {}}, term.sources[in("shared")].users)

	term.sourceChanged(in("hub"))
	term.sourceChanged(in("unknown"))
	require.Equal(t, []string{"uid-a"}, term.queuedResources())
	term.releaseSources("uid-a", nil)
	require.Len(t, stopped, 5)
	require.Len(t, term.sources, 1)
}

func TestASourceThatCannotBeReadKeepsWhatItGaveBefore(t *testing.T) {
	t.Parallel()
	forbidden := apierrors.NewForbidden(corev1.Resource("secrets"), "hub", errors.New("no"))
	key := types.NamespacedName{Namespace: "registry-access", Name: "hub"}
	hub := corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name}, Type: corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(`{"auths":{"r.io":{"username":"u","password":"1"}}}`)},
	}
	tests := map[string]struct {
		list, watch error
		absent      bool
		want        credential
	}{
		"it cannot be listed":                       {list: forbidden, want: credential{err: forbidden}},
		"it cannot be watched any more":             {watch: forbidden, want: credential{err: forbidden}},
		"it cannot be watched, and is not there":    {watch: forbidden, absent: true, want: credential{err: forbidden}},
		"the server is away: what was read counts":  {watch: apierrors.NewInternalError(errors.New("x")), want: credential{given: given{config: configOf(t, "r.io=1")}}},
		"the server is away, and it was not there":  {watch: apierrors.NewInternalError(errors.New("x")), absent: true, want: credential{err: errors.New("not found"), withdrawn: true}},
		"the server is away from the very start on": {list: apierrors.NewInternalError(errors.New("x")), want: credential{err: apierrors.NewInternalError(errors.New("x"))}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				list := &corev1.SecretList{Items: []corev1.Secret{hub}}
				if test.absent {
					list.Items = nil
				}
				config := sourceConfig(&term{Coordinator: &Coordinator{log: slog.New(slog.DiscardHandler)}})
				config.ListWatch = &cache.ListWatch{
					ListWithContextFunc: func(context.Context, metav1.ListOptions) (runtime.Object, error) { return list, test.list },
					WatchFuncWithContext: func(context.Context, metav1.ListOptions) (watch.Interface, error) {
						return watch.NewFake(), test.watch
					},
				}
				if test.watch == nil {
					config.ListWatch.(*cache.ListWatch).WatchFuncWithContext = func(context.Context, metav1.ListOptions) (watch.Interface, error) {
						return nil, errors.New("not supported")
					}
				}
				s := &source{mirror: impsync.NewMirror(config)}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				go s.mirror.Run(ctx)
				synctest.Wait()
				var got credential
				s.read(key, &got)
				require.Equal(t, test.want.err, got.err)
				require.Equal(t, test.want.withdrawn, got.withdrawn)
				require.False(t, got.pending)
				require.Equal(t, plain(test.want.config), plain(got.config))
			})
		})
	}
}

func sourceConfig(term *term) impsync.MirrorConfig[sourceSecret] {
	return impsync.MirrorConfig[sourceSecret]{
		Name: "source", Example: &corev1.Secret{}, Log: term.log,
		Convert: func(o runtime.Object) sourceSecret { return sourceOf(o.(*corev1.Secret), nil) },
	}
}
