package cluster

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
)

// ecrSecretType is banzaicloud/imps's type of a Secret with AWS keys.
const ecrSecretType = "banzaicloud.io/aws-ecr-login-config"

// ecrUsername is the user of every ECR token.
const ecrUsername = "AWS"

// ErrIdentityChanged and ErrNoCredentials are what a Token's error may be.
var (
	ErrIdentityChanged = errors.New("the coordinator's AWS identity has changed")
	ErrNoCredentials   = errors.New("the coordinator has no AWS credentials")
)

// Grant is a token of ECR to ask for: by whom, and where.
type Grant interface {
	// ID changes with everything that changes who asks, or where. It may be derived from credentials.
	ID() string
}

// Registry is an ECR registry, and the grant whose token opens it.
type Registry struct {
	Host  string
	Grant Grant
}

// entry is what a docker config has for the registry, with a token.
func (r Registry) entry(token dockerconfig.Sensitive) dockerconfig.Entry {
	return dockerconfig.Entry{Key: dockerconfig.NewSensitive(r.Host), Username: dockerconfig.NewSensitive(ecrUsername), Password: token}
}

// Token is one that ECR has given out. Issued and Expires are by the clock of AWS.
type Token struct {
	Password        dockerconfig.Sensitive
	Issued, Expires time.Time
	// Principal is who asked for it, where that was the coordinator itself.
	Principal string
}

// equal reports whether both are the same token.
func (t Token) equal(other Token) bool {
	return t.Password.Equal(other.Password) && t.Issued.Equal(other.Issued) && t.Expires.Equal(other.Expires) && t.Principal == other.Principal
}

// TokenStatus is what is known of a grant.
type TokenStatus struct {
	// Token may be used; its Password is empty where there is none.
	Token Token
	// Err says why there is no new one, also where the last one is still good.
	Err error
	// Pending: nothing is known yet.
	Pending bool
}

// Wanted is a grant that a resource wants, and its token from before, if any.
type Wanted struct {
	Grant Grant
	Known Token
}

// ECRSources knows what a source asks ECR for. Errors are those of the source.
type ECRSources interface {
	// Secret is one of the type banzaicloud.io/aws-ecr-login-config.
	Secret(data map[string][]byte) ([]Registry, error)
	// Spec is the inline form.
	Spec(spec v1alpha1.ECRSource) ([]Registry, error)
}

// Tokens mints tokens and renews them. It calls Coordinator.TokenChanged where a status changes.
type Tokens interface {
	// Use says which grants a user wants from now on, none to end it.
	Use(user string, wanted []Wanted)
	Status(grant Grant) TokenStatus
	// Now is the time at AWS, as far as is known.
	Now() time.Time
}

// ecrKeys gives the inline ECR sources of a resource their keys in status.sourceSecretStatus.
type ecrKeys map[string]int

// of returns "ecr.<first registry>", and from the second one that has it on "ecr.<first registry>#2".
func (k ecrKeys) of(spec v1alpha1.ECRSource) string {
	key := "ecr."
	if len(spec.Registries) > 0 {
		key += dockerconfig.Entry{Key: dockerconfig.NewSensitive(spec.Registries[0])}.Registry() // it may be anything yet
	}
	if k[key]++; k[key] > 1 {
		key += fmt.Sprintf("#%d", k[key])
	}
	return key
}

// awsNow is the time by which tokens expire.
func (c *Coordinator) awsNow() time.Time {
	if c.config.Tokens == nil {
		return time.Now()
	}
	return c.config.Tokens.Now()
}

// registriesOf returns what an inline ECR source asks for.
func (c *Coordinator) registriesOf(spec v1alpha1.ECRSource) ([]Registry, error) {
	if c.config.ECRSources == nil {
		return nil, fmt.Errorf("ecr sources are %w", errNotSupported)
	}
	return c.config.ECRSources.Spec(spec)
}

// useTokens asks for the tokens of all ECR sources of a resource, and returns those that may be used, by the grant's ID.
func (t *term) useTokens(user types.UID, credentials []credential, known map[string]Token) map[string]Token {
	if t.config.Tokens == nil {
		return nil
	}
	wanted := wantedBy(credentials, known)
	t.change(func() { // first, so that no change is missed
		delete(t.grants, user)
		if len(wanted) > 0 {
			t.grants[user] = map[string]struct{}{}
		}
		for _, w := range wanted {
			t.grants[user][w.Grant.ID()] = struct{}{}
		}
	})
	t.config.Tokens.Use(string(user), wanted)
	tokens := readTokens(t.config.Tokens, credentials)
	for _, c := range credentials {
		if errors.Is(c.err, ErrNoCredentials) {
			t.giveUp()
		}
		if c.err != nil && len(c.registries) == 0 && !c.withdrawn {
			// Which ones it wants is not known at present.
			for id, token := range known {
				if _, ok := tokens[id]; !ok && t.awsNow().Before(token.Expires) {
					tokens[id] = token
				}
			}
		}
	}
	return tokens
}

// wantedBy returns the grants of all ECR sources among some, each once.
func wantedBy(credentials []credential, known map[string]Token) []Wanted {
	var wanted []Wanted
	ids := map[string]struct{}{}
	for _, c := range credentials {
		for _, r := range c.registries {
			id := r.Grant.ID()
			if _, ok := ids[id]; !ok {
				ids[id] = struct{}{}
				wanted = append(wanted, Wanted{Grant: r.Grant, Known: known[id]})
			}
		}
	}
	return wanted
}

// readTokens fills all ECR sources among some in, and returns the tokens that may be used, by the grant's ID.
func readTokens(from Tokens, credentials []credential) map[string]Token {
	tokens := map[string]Token{}
	for i := range credentials {
		credentials[i].readTokens(from, tokens)
	}
	return tokens
}

// readTokens fills an ECR source in with the tokens that there are.
func (c *credential) readTokens(from Tokens, tokens map[string]Token) {
	if c.err != nil || len(c.registries) == 0 {
		return
	}
	c.lacking, c.expiries = map[string]struct{}{}, map[string]time.Time{}
	var entries []dockerconfig.Entry
	told := map[string]struct{}{}
	for _, r := range c.registries {
		id := r.Grant.ID()
		s := from.Status(r.Grant)
		c.pending = c.pending || s.Pending
		if _, ok := told[id]; !ok && s.Err != nil {
			c.err = errors.Join(c.err, s.Err)
		}
		told[id] = struct{}{}
		switch {
		case !s.Token.Password.IsZero():
			tokens[id] = s.Token
			c.expiries[r.Host] = s.Token.Expires
			entries = append(entries, r.entry(s.Token.Password))
		case s.Err != nil:
			c.lacking[r.Host] = struct{}{}
		}
	}
	config, err := dockerconfig.New(entries...)
	if err != nil {
		c.err, c.lacking, c.expiries = fmt.Errorf("tokens: %w", err), nil, nil
		return
	}
	c.config = config
}

// giveUp ends the term for want of AWS credentials, but not again and again.
func (t *term) giveUp() {
	now := time.Now()
	was := t.gaveUp.Load()
	if was != nil && now.Sub(*was) < giveUpInterval || !t.gaveUp.CompareAndSwap(was, &now) {
		return
	}
	t.stop(ErrNoCredentials)
}

// releaseTokens ends what a resource wanted.
func (t *term) releaseTokens(user types.UID) {
	if t.config.Tokens == nil {
		return
	}
	t.change(func() { delete(t.grants, user) })
	t.config.Tokens.Use(string(user), nil)
}

// releaseAllTokens ends what all resources wanted: another coordinator goes on.
func (t *term) releaseAllTokens() {
	t.mu.Lock()
	users := slices.Collect(maps.Keys(t.grants))
	t.mu.Unlock()
	for _, user := range users {
		t.releaseTokens(user)
	}
}

// tokenChanged has the resources looked at that use a grant.
func (t *term) tokenChanged(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for user, ids := range t.grants {
		if _, ok := ids[id]; ok {
			t.resourceQueue.Add(user)
		}
	}
}

// TokenChanged is to be called with the ID of a grant whose status has changed.
func (c *Coordinator) TokenChanged(id string) {
	if t := c.leads.Load(); t != nil {
		t.tokenChanged(id)
	}
}
