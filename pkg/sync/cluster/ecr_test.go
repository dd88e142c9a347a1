package cluster

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// grantOf is the grant of a region.
type grantOf string

func (g grantOf) ID() string { return string(g) }

// cloud is an ECR whose registries are "<account>.<region>"; one that begins with "!" is none.
type cloud struct {
	statuses map[string]TokenStatus
	used     map[string][]Wanted
	now      time.Time
}

func (*cloud) registries(hosts ...string) ([]Registry, error) {
	var registries []Registry
	for _, host := range hosts {
		_, region, ok := strings.Cut(host, ".")
		if !ok {
			return nil, fmt.Errorf("%s: not an ECR registry", host)
		}
		registries = append(registries, Registry{Host: host, Grant: grantOf(region)})
	}
	return registries, nil
}

func (c *cloud) Secret(data map[string][]byte) ([]Registry, error) {
	return c.registries(string(data["host"]))
}

func (c *cloud) Spec(spec v1alpha1.ECRSource) ([]Registry, error) {
	return c.registries(spec.Registries...)
}

func (c *cloud) Use(user string, wanted []Wanted) { c.used[user] = wanted }

func (c *cloud) Status(grant Grant) TokenStatus {
	s, ok := c.statuses[grant.ID()]
	if !ok {
		return TokenStatus{Pending: true}
	}
	return s
}

func (c *cloud) Now() time.Time { return c.now }

// inCloud gives the term an ECR.
func (t *term) inCloud() *cloud {
	c := &cloud{statuses: map[string]TokenStatus{}, used: map[string][]Wanted{}, now: noon}
	t.config.ECRSources, t.config.Tokens = c, c
	return c
}

// tokenOf is a token that was issued at noon and expires so many hours later.
func tokenOf(password string, hours int) Token {
	return Token{Password: dockerconfig.NewSensitive(password), Issued: noon, Expires: noon.Add(time.Duration(hours) * time.Hour)}
}

func withSources(t *testing.T, sources ...v1alpha1.CredentialSource) *v1alpha1.ImagePullSecret {
	t.Helper()
	r := resource(t, "a", 0, byName)
	r.Spec.Registry.Credentials = sources
	return r
}

func inline(hosts ...string) v1alpha1.CredentialSource {
	return v1alpha1.CredentialSource{ECR: &v1alpha1.ECRSource{Registries: hosts}}
}

func TestTokensBecomeCredentials(t *testing.T) {
	t.Parallel()
	away := errors.New("AWS throttles")
	tests := map[string]struct {
		sources  []v1alpha1.CredentialSource
		statuses map[string]TokenStatus
		config   []string
		status   map[string]string
		tokens   []string
		expiries map[string]time.Time
		pending  bool
		failed   bool
	}{
		"one registry": {
			sources: []v1alpha1.CredentialSource{inline("1.eu")}, statuses: map[string]TokenStatus{"eu": {Token: tokenOf("t", 12)}},
			config: []string{"1.eu=t"}, status: map[string]string{"ecr.1.eu": "Ok"}, tokens: []string{"eu"},
			expiries: map[string]time.Time{"1.eu": noon.Add(12 * time.Hour)},
		},
		"several, of which some share a token": {
			sources:  []v1alpha1.CredentialSource{inline("1.eu", "2.eu", "3.us"), inline("4.eu")},
			statuses: map[string]TokenStatus{"eu": {Token: tokenOf("t", 12)}, "us": {Token: tokenOf("u", 6)}},
			config:   []string{"1.eu=t", "2.eu=t", "3.us=u", "4.eu=t"}, status: map[string]string{"ecr.1.eu": "Ok", "ecr.4.eu": "Ok"}, tokens: []string{"eu", "us"},
			expiries: map[string]time.Time{"1.eu": noon.Add(12 * time.Hour), "2.eu": noon.Add(12 * time.Hour), "3.us": noon.Add(6 * time.Hour), "4.eu": noon.Add(12 * time.Hour)},
		},
		"nothing is known yet": {
			sources: []v1alpha1.CredentialSource{inline("1.eu", "3.us")}, statuses: map[string]TokenStatus{"eu": {Token: tokenOf("t", 12)}}, pending: true,
		},
		"the renewal fails": {
			sources: []v1alpha1.CredentialSource{inline("1.eu", "2.eu")}, statuses: map[string]TokenStatus{"eu": {Token: tokenOf("t", 12), Err: away}},
			config: []string{"1.eu=t", "2.eu=t"}, tokens: []string{"eu"},
			status:   map[string]string{"ecr.1.eu": "AWS throttles; its last good credentials stay in use until 2026-03-02T00:00:00Z"},
			expiries: map[string]time.Time{"1.eu": noon.Add(12 * time.Hour), "2.eu": noon.Add(12 * time.Hour)},
			failed:   true,
		},
		"there is no token": {
			sources: []v1alpha1.CredentialSource{inline("1.eu")}, statuses: map[string]TokenStatus{"eu": {Err: away}},
			status: map[string]string{"ecr.1.eu": "AWS throttles"}, failed: true,
		},
		"one region fails, the other does not": {
			sources: []v1alpha1.CredentialSource{inline("1.eu", "3.us")}, statuses: map[string]TokenStatus{"eu": {Token: tokenOf("t", 12)}, "us": {Err: away}},
			config: []string{"1.eu=t"}, tokens: []string{"eu"},
			status:   map[string]string{"ecr.1.eu": "AWS throttles; its last good credentials stay in use until 2026-03-02T00:00:00Z"},
			expiries: map[string]time.Time{"1.eu": noon.Add(12 * time.Hour)},
			failed:   true,
		},
		"there is nothing to be had, and that is well": {
			sources: []v1alpha1.CredentialSource{inline("1.eu")}, statuses: map[string]TokenStatus{"eu": {}},
			status: map[string]string{"ecr.1.eu": "Ok"},
		},
		"a host that is none": {
			sources: []v1alpha1.CredentialSource{inline("1.eu", "ghcr")}, statuses: map[string]TokenStatus{"eu": {Token: tokenOf("t", 12)}},
			status: map[string]string{"ecr.1.eu": "ghcr: not an ECR registry"}, failed: true,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			term := newTestTerm(t)
			ecr := term.inCloud()
			ecr.statuses = test.statuses
			r := withSources(t, test.sources...)
			credentials := term.readCredentials(r)
			tokens := term.useTokens(r.UID, credentials, nil)
			got := resolve(credentials, &state{}, noon)
			require.Equal(t, test.pending, got.pending)
			if test.pending {
				return
			}
			require.Equal(t, test.config, plain(got.config))
			require.Equal(t, test.status, got.sources)
			require.Len(t, tokens, len(test.tokens))
			for _, id := range test.tokens {
				require.True(t, tokens[id].equal(test.statuses[id].Token))
			}
			require.Len(t, got.expiries, len(test.expiries))
			for registry, expires := range test.expiries {
				require.Equal(t, expires, got.expiries[registry])
			}
			require.Equal(t, test.failed, len(failedSources(got.sources)) > 0)
			require.True(t, got.until.IsZero(), "whoever mints tokens watches over them")
		})
	}
}

// What a source gave before stays in use where nobody knows any more what it asks for, as long as it is good.
func TestTokensOfASourceThatCannotBeReadAnyMoreStayUntilTheyExpire(t *testing.T) {
	t.Parallel()
	broken := []credential{{key: "a", err: errors.New("no such key")}}
	known := &state{lastGood: map[string]given{"a": {configOf(t, "1.eu=t"), map[string]time.Time{"1.eu": noon.Add(time.Hour)}}}}
	end := noon.Add(time.Hour - expiryMargin)
	r := resolve(broken, known, end.Add(-1))
	require.Equal(t, []string{"1.eu=t"}, plain(r.config))
	require.Equal(t, end, r.until)
	require.Equal(t, "no such key; its last good credentials stay in use until 2026-03-01T13:00:00Z", r.sources["a"])
	r = resolve(broken, known, end)
	require.Empty(t, r.config.Entries())
	require.Empty(t, plain(r.lastGood["a"].config))
	require.False(t, r.incomplete, "it is known that it has nothing any more")
	require.Zero(t, r.until)
	require.Equal(t, "no such key", r.sources["a"])
}

// Where a docker config that is listed later has the same registry, that does not expire.
func TestTheExpiryOfARegistryIsThatOfTheLastListed(t *testing.T) {
	t.Parallel()
	token := credential{key: "ecr", given: given{configOf(t, "1.eu=t", "2.eu=t"), map[string]time.Time{"1.eu": noon, "2.eu": noon}}}
	static := credential{key: "static", given: given{config: configOf(t, "1.eu=s")}}
	require.Equal(t, map[string]time.Time{"2.eu": noon}, resolve([]credential{token, static}, &state{}, noon).expiries)
	require.Equal(t, map[string]time.Time{"1.eu": noon, "2.eu": noon}, resolve([]credential{static, token}, &state{}, noon).expiries)
}

func TestTheTokensOfAnEarlierTermAreHandedOn(t *testing.T) {
	t.Parallel()
	term := newTestTerm(t)
	ecr := term.inCloud()
	r := withSources(t, inline("1.eu", "2.eu", "3.us"), inline("4.us"))
	known := map[string]Token{"eu": tokenOf("old", 12), "gone": tokenOf("x", 12)}
	term.useTokens(r.UID, term.readCredentials(r), known)
	require.Len(t, ecr.used["uid-a"], 2, "each once")
	for i, id := range []string{"eu", "us"} {
		require.Equal(t, grantOf(id), ecr.used["uid-a"][i].Grant)
		require.True(t, known[id].equal(ecr.used["uid-a"][i].Known))
	}

	term.tokenChanged("us")
	require.Equal(t, []string{"uid-a"}, term.queuedResources())
	term.tokenChanged("gone")
	require.Empty(t, term.queuedResources())
	term.TokenChanged("us") // nobody leads
	term.leads.Store(term)
	term.TokenChanged("us")
	require.Equal(t, []string{"uid-a"}, term.queuedResources())

	r = withSources(t)
	term.useTokens(r.UID, term.readCredentials(r), known)
	require.Empty(t, ecr.used["uid-a"])
	term.tokenChanged("us")
	require.Empty(t, term.queuedResources())

	r = withSources(t, inline("1.eu"))
	term.useTokens(r.UID, term.readCredentials(r), known)
	require.NotEmpty(t, ecr.used["uid-a"])
	term.releaseAllTokens()
	require.Empty(t, ecr.used["uid-a"], "another leads now")
	require.Empty(t, term.grants)
}

func TestECRSourcesOfEachForm(t *testing.T) {
	t.Parallel()
	term := newTestTerm(t)
	secret := &corev1.Secret{Type: ecrSecretType, Data: map[string][]byte{"host": []byte("1.eu")}}
	require.ErrorIs(t, sourceOf(secret, term.config.ECRSources).err, errNotSupported)
	require.ErrorIs(t, term.readCredentials(withSources(t, inline("1.eu")))[0].err, errNotSupported)
	term.inCloud()
	read := sourceOf(secret, term.config.ECRSources)
	require.NoError(t, read.err)
	require.Equal(t, []Registry{{Host: "1.eu", Grant: grantOf("eu")}}, read.registries)
	secret.Data["host"] = []byte(canary)
	require.Error(t, sourceOf(secret, term.config.ECRSources).err)
}

// A coordinator without AWS credentials lets another one lead, and does it itself where nobody else will.
func TestWhoeverHasNoCredentialsGivesTheLeaseUpOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		ecr := s.inCloud()
		ecr.statuses["eu"] = TokenStatus{Token: tokenOf("t", 12), Err: fmt.Errorf("x: %w", ErrNoCredentials)}
		var stopped []error
		s.stop = func(err error) { stopped = append(stopped, err) }
		r := withSources(t, inline("1.eu"))
		for range 3 {
			s.useTokens(r.UID, s.readCredentials(r), nil)
		}
		require.Equal(t, []error{ErrNoCredentials}, stopped)
		<-time.After(giveUpInterval)
		s.useTokens(r.UID, s.readCredentials(r), nil)
		require.Len(t, stopped, 2)
	})
}

func TestTheStatusTellsHowLongCredentialsAreGood(t *testing.T) {
	t.Parallel()
	require.Zero(t, validity(time.Time{}, noon))
	require.Equal(t, int64(3600), validity(noon.Add(time.Hour), noon))
	require.Equal(t, int64(1), validity(noon.Add(-time.Hour), noon), "zero means that nothing expires")
}

func TestTheStatusSaysThatTheIdentityHasChanged(t *testing.T) {
	t.Parallel()
	credentials := []credential{{key: "ecr.1.eu", err: fmt.Errorf("x: %w", ErrIdentityChanged), given: given{configOf(t, "1.eu=t"), map[string]time.Time{"1.eu": noon.Add(time.Hour)}}, lacking: map[string]struct{}{}}}
	r := resolve(credentials, &state{}, noon)
	require.True(t, r.identityChanged)
	c := &claim{sources: r.sources, identityChanged: r.identityChanged}
	condition := sourcesReady(c)
	require.Equal(t, "IdentityChanged", condition.Reason)
	require.Contains(t, condition.Message, "stay in use until")
}

// inForce is the resource "a", delivered as it was rendered with these registries and expiries.
func (s *situation) inForce(t *testing.T, r *v1alpha1.ImagePullSecret, expiries map[string]time.Time, registries ...string) *claim {
	t.Helper()
	config, err := configOf(t, registries...).Render()
	require.NoError(t, err)
	target, err := impsync.NewTarget(impsync.RefOf(r), r.Spec.Target.Secret, 7, config)
	require.NoError(t, err)
	rendered := impsync.Rendered{FormatVersion: 1, Resource: impsync.RefOf(r), Namespaces: r.Spec.Target.Namespaces, Expiries: expiries, Target: target}
	s.rendered.Put(s.renderedKey(r.UID), renderedSecret{rendered: rendered, resourceVersion: "1"})
	c := newClaim(r, rendered)
	c.state = &state{counter: 7, uid: "there", resourceVersion: "5"}
	s.byUID[r.UID] = r
	s.putClaim(c)
	return c
}

// Where what a resource holds cannot be told from its sources alone, tokens are renewed and go when they expire all the
// same.
func TestWhatIsHeldHasTheNewestTokensAndNoneThatHasExpired(t *testing.T) {
	t.Parallel()
	at := func(hours int) time.Time { return noon.Add(time.Duration(hours) * time.Hour) }
	for name, test := range map[string]struct {
		renewed []string
		hours   int
		want    map[string]time.Time // zero for what does not expire
	}{
		"nothing is renewed":                   {nil, 0, map[string]time.Time{"1.eu=t": at(1), "2.us=u": at(2), "r.io=s": {}}},
		"one has expired":                      {nil, 1, map[string]time.Time{"2.us=u": at(2), "r.io=s": {}}},
		"all that expire have":                 {nil, 2, map[string]time.Time{"r.io=s": {}}},
		"one is renewed":                       {[]string{"1.eu=new"}, 0, map[string]time.Time{"1.eu=new": at(12), "2.us=u": at(2), "r.io=s": {}}},
		"one is renewed, the other has ended":  {[]string{"1.eu=new"}, 2, map[string]time.Time{"1.eu=new": at(12), "r.io=s": {}}},
		"something comes to it":                {[]string{"3.eu=new"}, 0, map[string]time.Time{"1.eu=t": at(1), "2.us=u": at(2), "r.io=s": {}, "3.eu=new": at(12)}},
		"what does not expire is not replaced": {[]string{"r.io=new"}, 0, map[string]time.Time{"1.eu=t": at(1), "2.us=u": at(2), "r.io=s": {}}},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				s.inCloud().now = at(test.hours)
				c := s.inForce(t, resource(t, "a", 0, byName), map[string]time.Time{"1.eu": at(1), "2.us": at(2)}, "1.eu=t", "2.us=u", "r.io=s")
				newest := given{configOf(t, append(test.renewed, "static.io=x")...), map[string]time.Time{}}
				for _, entry := range test.renewed {
					registry, _, _ := strings.Cut(entry, "=")
					newest.expiries[registry] = at(12)
				}
				held, err := s.hold(c.rendered, newest)
				require.NoError(t, err)
				got := map[string]time.Time{}
				for _, entry := range plain(held.config) {
					registry, _, _ := strings.Cut(entry, "=")
					got[entry] = held.expiries[registry]
				}
				require.Equal(t, test.want, got)
				s.queuedResources()
				<-time.After(time.Minute)
				synctest.Wait()
				watched := map[bool]int{true: 1}[slices.ContainsFunc(plain(held.config), func(e string) bool { return e == "1.eu=t" || e == "2.us=u" })]
				require.Len(t, s.queuedResources(), watched, "nobody else watches over what is not renewed")
			})
		})
	}
}

// Whatever is wrong with the newest spec, tokens in what is in force do not expire for it.
func TestTokensAreRenewedWhereTheSpecHasAProblem(t *testing.T) {
	t.Parallel()
	huge := v1alpha1.CredentialSource{Namespace: "registry-access", Name: "huge"}
	for name, test := range map[string]struct {
		target  string
		sources []v1alpha1.CredentialSource
		problem string
	}{
		"a name that is not allowed":  {`{secret: {name: nope}, namespaces: {names: [m]}}`, nil, "nope"},
		"a selector that is none":     {`{secret: {name: pull}, namespaces: {labels: [{matchExpressions: [{key: x, operator: Foo}]}]}}`, nil, "Foo"},
		"more than a Secret can hold": {byName, []v1alpha1.CredentialSource{huge}, "too large: 3 registries"},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				ecr := s.inCloud()
				there := sourceMirror(t, s.term, corev1.Secret{
					ObjectMeta: metav1.ObjectMeta{Namespace: huge.Namespace, Name: huge.Name}, Type: corev1.SecretTypeDockerConfigJson,
					Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(`{"auths":{"r.io":{"username":"u","password":"` + noise(corev1.MaxSecretSize*9/20) + `"}}}`)},
				})
				there.stop = func() {}
				s.sources[types.NamespacedName{Namespace: huge.Namespace, Name: huge.Name}] = there
				c := s.inForce(t, resource(t, "a", 0, byName), map[string]time.Time{"1.eu": noon.Add(time.Hour)}, "1.eu=old", "r.io=s")
				c.state.tokens = map[string]Token{"eu": tokenOf("old", 1)}
				c.state.lastGood = map[string]given{"ecr.1.eu": {configOf(t, "1.eu=old"), map[string]time.Time{"1.eu": noon.Add(time.Hour)}}}
				r := resource(t, "a", 0, test.target)
				r.Generation = 2
				r.Spec.Registry.Credentials = append(test.sources, inline("1.eu", "2.eu"))
				s.byUID[r.UID] = r
				ecr.statuses["eu"] = TokenStatus{Token: tokenOf(canary, 12)}
				s.server().accepts = true
				require.NoError(t, s.reconcileResource(t.Context(), r.UID))
				require.ErrorContains(t, c.problem, test.problem)
				require.Len(t, s.server().asked(), 2, "state and rendered Secret")
				require.Equal(t, uint64(8), c.rendered.Target.Revision().Counter)
				require.Equal(t, "pull", c.rendered.Target.Name())
				require.Contains(t, c.rendered.Namespaces.Names, "n")
				require.ElementsMatch(t, []string{"1.eu=" + canary, "r.io=s"}, c.delivers(t), "renewed, and nothing else")
				require.Equal(t, map[string]time.Time{"1.eu": noon.Add(12 * time.Hour)}, c.rendered.Expiries)
				require.NoError(t, s.reconcileResource(t.Context(), r.UID))
				require.Empty(t, s.server().asked(), "once")
			})
		})
	}
}

// delivers is what the Secrets of a claim hold.
func (c *claim) delivers(t *testing.T) []string {
	t.Helper()
	config, err := c.rendered.Target.Credentials()
	require.NoError(t, err)
	return plain(config)
}

// A token that came to its end for want of AWS comes back, whatever is wrong with the spec.
func TestATokenComesBackWhereTheSpecHasAProblem(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		ecr := s.inCloud()
		c := s.inForce(t, resource(t, "a", 0, byName), map[string]time.Time{"1.eu": noon.Add(time.Hour)}, "1.eu=old", "r.io=s")
		c.state.tokens = map[string]Token{"eu": tokenOf("old", 1)}
		c.state.lastGood = map[string]given{"ecr.1.eu": {configOf(t, "1.eu=old"), map[string]time.Time{"1.eu": noon.Add(time.Hour)}}}
		r := resource(t, "a", 0, `{secret: {name: nope}, namespaces: {names: [m]}}`)
		r.Generation = 2
		r.Spec.Registry.Credentials = []v1alpha1.CredentialSource{inline("1.eu")}
		s.byUID[r.UID] = r
		s.server().accepts = true
		ecr.now = noon.Add(2 * time.Hour)
		ecr.statuses["eu"] = TokenStatus{Err: errors.New("AWS throttles")}
		require.NoError(t, s.reconcileResource(t.Context(), r.UID))
		require.Equal(t, []string{"r.io=s"}, c.delivers(t))
		ecr.statuses["eu"] = TokenStatus{Token: tokenOf("new", 14)}
		require.NoError(t, s.reconcileResource(t.Context(), r.UID))
		require.Equal(t, []string{"1.eu=new", "r.io=s"}, c.delivers(t))
	})
}

// byRole is an ECR whose grants are those of roles.
type byRole struct{ *cloud }

func (byRole) Spec(spec v1alpha1.ECRSource) ([]Registry, error) {
	return []Registry{{Host: spec.Registries[0], Grant: grantOf(spec.RoleARN)}}, nil
}

// What a spec that cannot be used wants delivered to others, as another one, is not delivered to those of the spec before.
func TestTheTokenOfAnotherRoleIsNotDeliveredByASpecThatHasAProblem(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		ecr := s.inCloud()
		s.config.ECRSources = byRole{ecr}
		c := s.inForce(t, resource(t, "a", 0, byName), map[string]time.Time{"1.eu": noon.Add(time.Hour)}, "1.eu=old")
		c.state.tokens = map[string]Token{"pull": tokenOf("old", 1)}
		c.state.lastGood = map[string]given{"ecr.1.eu": {configOf(t, "1.eu=old"), map[string]time.Time{"1.eu": noon.Add(time.Hour)}}}
		s.server().accepts = true
		ecr.statuses = map[string]TokenStatus{"admin": {Token: tokenOf("admin", 12)}, "pull": {Token: tokenOf("new", 12)}}
		for i, test := range []struct{ role, delivered string }{{"admin", "old"}, {"pull", "new"}} {
			r := resource(t, "a", 0, `{secret: {name: nope}, namespaces: {names: [m]}}`)
			r.Generation = int64(2 + i)
			r.Spec.Registry.Credentials = []v1alpha1.CredentialSource{{ECR: &v1alpha1.ECRSource{Registries: []string{"1.eu"}, RoleARN: test.role}}}
			s.byUID[r.UID] = r
			require.NoError(t, s.reconcileResource(t.Context(), r.UID))
			require.Equal(t, []string{"1.eu=" + test.delivered}, c.delivers(t))
		}
	})
}

// The state Secret is lost, and of one source one region can be asked, and one cannot.
func TestALostStateKeepsTheRegionThatFails(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		ecr := s.inCloud()
		r := withSources(t, inline("1.eu", "2.us"))
		c := s.inForce(t, r, map[string]time.Time{"1.eu": noon.Add(6 * time.Hour), "2.us": noon.Add(6 * time.Hour)}, "1.eu=old", "2.us=old")
		c.state = &state{incomplete: true}
		ecr.statuses = map[string]TokenStatus{"eu": {Token: tokenOf("new", 12)}, "us": {Err: errors.New("AWS throttles")}}
		s.server().accepts = true
		s.server().answers = map[string]any{"GET /apis/images.banzaicloud.io/v1alpha1/imagepullsecrets/a": r}
		require.NoError(t, s.reconcileResource(t.Context(), r.UID))
		require.Equal(t, []string{"1.eu=new", "2.us=old"}, c.delivers(t))
	})
}

// A source that cannot be read for a moment does not cost another token.
func TestASourceThatCannotBeReadForAMomentCostsNoCall(t *testing.T) {
	t.Parallel()
	term := newTestTerm(t)
	term.inCloud().now = noon
	known := map[string]Token{"eu": tokenOf("t", 12), "old": tokenOf("t", 0)}
	for err, kept := range map[error]int{nil: 0, apierrors.NewInternalError(errors.New("x")): 1} {
		require.Len(t, term.useTokens("uid-a", []credential{{key: "a", err: err}}, known), kept, "which is what the state holds from now on")
	}
	require.Empty(t, term.useTokens("uid-a", []credential{{key: "a", err: errors.New("not found"), withdrawn: true}}, known))
}

// The key of an inline source is told everywhere, and its hosts may be anything before they are looked at.
func TestTheKeyOfAnInlineSource(t *testing.T) {
	t.Parallel()
	keys := ecrKeys{}
	for _, test := range []struct {
		registries []string
		want       string
	}{
		{[]string{"1.eu", "2.eu"}, "ecr.1.eu"},
		{[]string{"2.eu", "1.eu"}, "ecr.2.eu"},
		{[]string{"1.eu"}, "ecr.1.eu#2"},
		{nil, "ecr."},
		{[]string{"user:" + canary + "@3.eu"}, "ecr.3.eu"},
	} {
		require.Equal(t, test.want, keys.of(v1alpha1.ECRSource{Registries: test.registries}))
	}
	require.Less(t, len(keys.of(v1alpha1.ECRSource{Registries: []string{strings.Repeat("x", 10_000)}})), 200)
}

// A Refresher knows when its credentials expire, also one that has just begun.
func TestARefresherKeepsNothingThatHasExpired(t *testing.T) {
	t.Parallel()
	for name, restarts := range map[string]bool{"one process": false, "another one": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			term := newTestTerm(t)
			ecr := term.inCloud()
			key, target := types.NamespacedName{Namespace: "n", Name: "keys"}, types.NamespacedName{Namespace: "n", Name: "pull"}
			term.server().accepts = true
			there := &corev1.SecretList{ListMeta: metav1.ListMeta{ResourceVersion: "1"}}
			var r *Refresher
			begin := func() {
				var err error
				r, err = NewRefresher(RefreshConfig{Sources: []types.NamespacedName{key}, Target: target, ECRSources: ecr, Tokens: ecr, Client: term.config.Client, Metrics: term.config.Metrics, Log: term.log})
				require.NoError(t, err)
				t.Cleanup(r.queue.ShutDown)
				r.sources[0] = &source{mirror: synced(t, impsync.MirrorConfig[sourceSecret]{
					Name: "source", Example: &corev1.Secret{}, Log: term.log, Convert: func(o runtime.Object) sourceSecret { return sourceOf(o.(*corev1.Secret), ecr) },
				}, &corev1.SecretList{Items: []corev1.Secret{{ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name}, Type: ecrSecretType, Data: map[string][]byte{"host": []byte("1.eu")}}}})}
				r.target = synced(t, impsync.MirrorConfig[refreshed]{
					Name: "target", Example: &corev1.Secret{}, Log: term.log,
					Convert: func(o runtime.Object) refreshed { return refreshedOf(o.(*corev1.Secret)) }, Version: func(s refreshed) string { return s.resourceVersion },
				}, there)
			}
			holds := func() []string {
				there, _ := r.target.Get(target)
				return plain(there.config)
			}
			begin()
			ecr.statuses["eu"] = TokenStatus{Token: tokenOf("t", 12)}
			require.NoError(t, r.refresh(t.Context()))
			require.Equal(t, []string{"1.eu=t"}, holds())
			if restarts {
				config, err := configOf(t, "1.eu=t").Render()
				require.NoError(t, err)
				there.Items = []corev1.Secret{{
					ObjectMeta: metav1.ObjectMeta{Namespace: target.Namespace, Name: target.Name, ResourceVersion: "1", Annotations: map[string]string{annotationExpiries: `{"1.eu":"2026-03-02T00:00:00Z"}`}},
					Type:       corev1.SecretTypeDockerConfigJson, Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(config.Reveal())},
				}}
				begin()
			}
			ecr.statuses["eu"] = TokenStatus{Err: errors.New("AWS throttles")}
			ecr.now = noon.Add(11 * time.Hour)
			require.ErrorIs(t, r.refresh(t.Context()), errIncomplete)
			require.Equal(t, []string{"1.eu=t"}, holds())
			ecr.now = noon.Add(12 * time.Hour)
			require.ErrorIs(t, r.refresh(t.Context()), errIncomplete)
			require.Empty(t, holds())
		})
	}
}

// A source that asks as somebody else from now on, and gets nothing.
func TestOtherKeysThatGetNothingLeaveTheTokenThatThereWas(t *testing.T) {
	t.Parallel()
	term := newTestTerm(t)
	ecr := term.inCloud()
	r := withSources(t, inline("1.eu", "2.eu", "3.us"))
	known := &state{lastGood: map[string]given{"ecr.1.eu": {
		configOf(t, "1.eu=old", "9.eu=old", "3.us=u"), map[string]time.Time{"1.eu": noon.Add(time.Hour), "9.eu": noon.Add(time.Hour), "3.us": noon.Add(time.Hour)},
	}}}
	ecr.statuses = map[string]TokenStatus{"eu": {Err: errors.New("AWS throttles")}, "us": {}}
	look := func(now time.Time) resolution {
		credentials := term.readCredentials(r)
		term.useTokens(r.UID, credentials, nil)
		return resolve(credentials, known, now)
	}
	got := look(noon)
	require.Equal(t, []string{"1.eu=old"}, plain(got.config), "only what is still asked for, and nothing where nothing is to be had")
	require.Equal(t, map[string]time.Time{"1.eu": noon.Add(time.Hour)}, got.expiries)
	require.Equal(t, noon.Add(time.Hour-expiryMargin), got.until, "nobody else watches over it")
	require.Equal(t, "AWS throttles; its last good credentials stay in use until 2026-03-01T13:00:00Z", got.sources["ecr.1.eu"])
	require.True(t, got.lastGood["ecr.1.eu"].equal(got.given))
	require.True(t, got.incomplete, "nothing is known of 2.eu")
	require.Empty(t, look(noon.Add(time.Hour-expiryMargin)).config.Entries())
	r = withSources(t, inline("2.eu", "1.eu"))
	require.Equal(t, []string{"1.eu=old"}, plain(look(noon).config), "whichever source gave it")
	ecr.statuses["eu"] = TokenStatus{Token: tokenOf("new", 12)}
	require.Equal(t, []string{"1.eu=new", "2.eu=new"}, plain(look(noon).config))

	gone := []credential{{key: "ecr.1.eu", err: errors.New("not found"), withdrawn: true}, {key: "x", err: errors.New("AWS throttles"), lacking: map[string]struct{}{"1.eu": {}}}}
	require.Empty(t, resolve(gone, known, noon).config.Entries(), "nothing of a source that is gone")
}

// A whole look at a resource: the token goes to state and rendered Secret, and from there everywhere.
func TestAResourceWaitsForItsTokens(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		ecr := s.inCloud()
		r := withSources(t, inline("1.eu"))
		s.byUID[r.UID] = r
		c := newClaim(r, impsync.Rendered{})
		c.state = &state{}
		s.claims[r.UID] = c
		require.NoError(t, s.reconcileResource(t.Context(), r.UID))
		require.Empty(t, s.server().asked(), "it is brought back once there is an answer")
		require.True(t, c.unread)
		ecr.statuses["eu"] = TokenStatus{Token: tokenOf(canary, 12)}
		err := s.reconcileResource(t.Context(), r.UID)
		require.Error(t, err, "there is no server")
		requireSilent(t, err.Error())
		require.Equal(t, []string{"POST /api/v1/namespaces/imps-system/secrets"}, s.server().asked(), "its state first")
		s.releaseTokens(r.UID)
		require.Empty(t, ecr.used["uid-a"])
	})
}
