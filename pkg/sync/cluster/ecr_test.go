package cluster

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

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
		expires  map[string]time.Time // by source
		expiries map[string]time.Time // by registry
		pending  bool
		failed   bool
	}{
		"one registry": {
			sources: []v1alpha1.CredentialSource{inline("1.eu")}, statuses: map[string]TokenStatus{"eu": {Token: tokenOf("t", 12)}},
			config: []string{"1.eu=t"}, status: map[string]string{"ecr.1.eu": "Ok"}, tokens: []string{"eu"},
			expires:  map[string]time.Time{"ecr.1.eu": noon.Add(12 * time.Hour)},
			expiries: map[string]time.Time{"1.eu": noon.Add(12 * time.Hour)},
		},
		"several, of which some share a token": {
			sources:  []v1alpha1.CredentialSource{inline("1.eu", "2.eu", "3.us"), inline("4.eu")},
			statuses: map[string]TokenStatus{"eu": {Token: tokenOf("t", 12)}, "us": {Token: tokenOf("u", 6)}},
			config:   []string{"1.eu=t", "2.eu=t", "3.us=u", "4.eu=t"}, status: map[string]string{"ecr.1.eu": "Ok", "ecr.4.eu": "Ok"}, tokens: []string{"eu", "us"},
			expires:  map[string]time.Time{"ecr.1.eu": noon.Add(6 * time.Hour), "ecr.4.eu": noon.Add(12 * time.Hour)},
			expiries: map[string]time.Time{"1.eu": noon.Add(12 * time.Hour), "2.eu": noon.Add(12 * time.Hour), "3.us": noon.Add(6 * time.Hour), "4.eu": noon.Add(12 * time.Hour)},
		},
		"nothing is known yet": {
			sources: []v1alpha1.CredentialSource{inline("1.eu", "3.us")}, statuses: map[string]TokenStatus{"eu": {Token: tokenOf("t", 12)}}, pending: true,
		},
		"the renewal fails": {
			sources: []v1alpha1.CredentialSource{inline("1.eu", "2.eu")}, statuses: map[string]TokenStatus{"eu": {Token: tokenOf("t", 12), Err: away}},
			config: []string{"1.eu=t", "2.eu=t"}, tokens: []string{"eu"},
			status:   map[string]string{"ecr.1.eu": "AWS throttles; its last good credentials stay in use until 2026-03-02T00:00:00Z"},
			expires:  map[string]time.Time{"ecr.1.eu": noon.Add(12 * time.Hour)},
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
			expires:  map[string]time.Time{"ecr.1.eu": noon.Add(12 * time.Hour)},
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
			if test.expires == nil {
				test.expires, test.expiries = map[string]time.Time{}, map[string]time.Time{}
			}
			require.Equal(t, test.expires, got.expires)
			require.Equal(t, test.expiries, got.expiries)
			require.Equal(t, test.failed, len(failedSources(got.sources)) > 0)
			require.True(t, got.until.IsZero(), "whoever mints tokens watches over them")
		})
	}
}

// What a source gave before stays in use where nobody knows any more what it asks for, as long as it is good.
func TestTokensOfASourceThatCannotBeReadAnyMoreStayUntilTheyExpire(t *testing.T) {
	t.Parallel()
	broken := []credential{{key: "a", err: errors.New("no such key")}}
	known := &state{
		lastGood: map[string]dockerconfig.Config{"a": configOf(t, "1.eu=t")},
		expires:  map[string]time.Time{"a": noon.Add(time.Hour)},
	}
	r := resolve(broken, known, noon.Add(time.Hour-1))
	require.Equal(t, []string{"1.eu=t"}, plain(r.config))
	require.Equal(t, noon.Add(time.Hour), r.until)
	require.Equal(t, "no such key; its last good credentials stay in use until 2026-03-01T13:00:00Z", r.sources["a"])
	r = resolve(broken, known, noon.Add(time.Hour))
	require.Empty(t, r.config.Entries())
	require.Empty(t, r.lastGood)
	require.Empty(t, r.expires)
	require.Equal(t, "no such key", r.sources["a"])
}

// Where a docker config that is listed later has the same registry, that does not expire.
func TestTheExpiryOfARegistryIsThatOfTheLastListed(t *testing.T) {
	t.Parallel()
	token := credential{key: "ecr", config: configOf(t, "1.eu=t", "2.eu=t"), expiries: map[string]time.Time{"1.eu": noon, "2.eu": noon}, current: true}
	static := credential{key: "static", config: configOf(t, "1.eu=s")}
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
	credentials := []credential{{key: "ecr.1.eu", err: fmt.Errorf("x: %w", ErrIdentityChanged), config: configOf(t, "1.eu=t"), expiries: map[string]time.Time{"1.eu": noon.Add(time.Hour)}, current: true}}
	r := resolve(credentials, &state{}, noon)
	require.True(t, r.identityChanged)
	c := &claim{sources: r.sources, identityChanged: r.identityChanged}
	condition := sourcesReady(c)
	require.Equal(t, "IdentityChanged", condition.Reason)
	require.Contains(t, condition.Message, "stay in use until")
}

// Of what is held as it was rendered, as a source fails of which nothing is known, what has expired goes.
func TestWhatHasExpiredIsNotHeld(t *testing.T) {
	t.Parallel()
	config, err := configOf(t, "1.eu=t", "2.us=u", "r.io=s").Render()
	require.NoError(t, err)
	r := resource(t, "a", 0, byName)
	target, err := impsync.NewTarget(impsync.RefOf(r), r.Spec.Target.Secret, 7, config)
	require.NoError(t, err)
	rendered := impsync.Rendered{Target: target, Expiries: map[string]time.Time{"1.eu": noon.Add(time.Hour), "2.us": noon.Add(2 * time.Hour)}}
	for hours, want := range map[int][]string{0: {"1.eu=t", "2.us=u", "r.io=s"}, 1: {"2.us=u", "r.io=s"}, 2: {"r.io=s"}} {
		held, expiries, err := unexpired(rendered, noon.Add(time.Duration(hours)*time.Hour))
		require.NoError(t, err)
		got, _, err := dockerconfig.Parse(string(corev1.SecretTypeDockerConfigJson), map[string][]byte{corev1.DockerConfigJsonKey: []byte(held.Reveal())})
		require.NoError(t, err)
		require.Equal(t, want, plain(got))
		require.Len(t, expiries, 2-hours)
	}
	rendered.Expiries = nil
	held, _, err := unexpired(rendered, noon)
	require.NoError(t, err)
	require.Equal(t, config.Reveal(), held.Reveal())
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
		require.Equal(t, noon.Add(12*time.Hour), c.expires)
		s.releaseTokens(r.UID)
		require.Empty(t, ecr.used["uid-a"])
	})
}
