package cluster

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// errStateGone: somebody deleted the state Secret.
var errStateGone = errors.New("the state Secret is gone")

// stateKey is the key of a state Secret's data.
const stateKey = "state" // compressed

// maxStateBytes bounds a state: what its docker configs may have, in base64, and what compressing spares.
const maxStateBytes = 64 << 20

// state is what a coordinator remembers of a resource beyond its term. Only coordinators
// can read it.
type state struct {
	// counter is the highest that any target was rendered with.
	counter uint64
	// lastGood is what each source gave last.
	lastGood map[string]given
	// tokens of ECR, by the ID of their grant.
	tokens map[string]Token
	// uid and resourceVersion are those of the state Secret; empty where there was none.
	uid             types.UID
	resourceVersion string
	// incomplete: of a source that fails nothing is known, but the rendered Secret may hold
	// its entries. So it is where there was no state Secret, or none that could be read.
	incomplete bool
}

// stateRecord is the JSON of a state.
type stateRecord struct {
	Counter    uint64                 `json:"counter"`
	Incomplete bool                   `json:"incomplete,omitempty"`
	LastGood   map[string]givenRecord `json:"lastGood"`
	Tokens     map[string]tokenRecord `json:"tokens,omitempty"`
}

// givenRecord is the JSON of what a source gave.
type givenRecord struct {
	Config   []byte               `json:"config"`
	Expiries map[string]time.Time `json:"expiries,omitempty"`
}

// tokenRecord is the JSON of a token.
type tokenRecord struct {
	Password  []byte    `json:"password"`
	Issued    time.Time `json:"issued"`
	Expires   time.Time `json:"expires"`
	Principal string    `json:"principal,omitempty"`
}

func encodeState(s state) ([]byte, error) {
	record := stateRecord{Counter: s.counter, Incomplete: s.incomplete, LastGood: map[string]givenRecord{}, Tokens: map[string]tokenRecord{}}
	for id, token := range s.tokens {
		record.Tokens[id] = tokenRecord{Password: []byte(token.Password.Reveal()), Issued: token.Issued, Expires: token.Expires, Principal: token.Principal}
	}
	for key, g := range s.lastGood {
		rendered, err := g.config.Render()
		if err != nil {
			return nil, fmt.Errorf("last good credentials of %s: %w", key, err)
		}
		record.LastGood[key] = givenRecord{Config: []byte(rendered.Reveal()), Expiries: g.expiries}
	}
	raw, err := json.Marshal(record)
	if err != nil {
		return nil, errors.New("encode state")
	}
	compressed := impsync.Compress(raw)
	if len(raw) > maxStateBytes || len(compressed) > corev1.MaxSecretSize {
		return nil, fmt.Errorf("the credentials of all sources are too large: compressed they are %d bytes, and a Secret holds at most %d; list fewer registries", len(compressed), corev1.MaxSecretSize)
	}
	return compressed, nil
}

func decodeState(compressed []byte) (state, error) {
	raw, err := impsync.Expand(compressed, maxStateBytes)
	if err != nil {
		return state{}, fmt.Errorf("state: %w", err)
	}
	var record stateRecord
	if err := json.Unmarshal(raw, &record); err != nil {
		return state{}, errors.New("state: not valid JSON")
	}
	s := state{counter: record.Counter, incomplete: record.Incomplete, lastGood: map[string]given{}, tokens: map[string]Token{}}
	for id, token := range record.Tokens {
		s.tokens[id] = Token{Password: dockerconfig.NewSensitive(token.Password), Issued: token.Issued, Expires: token.Expires, Principal: token.Principal}
	}
	for key, value := range record.LastGood {
		config, _, err := dockerconfig.Parse(string(corev1.SecretTypeDockerConfigJson), map[string][]byte{corev1.DockerConfigJsonKey: value.Config})
		if err != nil {
			return state{}, fmt.Errorf("state of %s: %w", key, err)
		}
		s.lastGood[key] = given{config, value.Expiries}
	}
	return s, nil
}

// sameState reports whether writing b over a would change nothing.
func sameState(a, b state) bool {
	return a.resourceVersion != "" && a.counter == b.counter && a.incomplete == b.incomplete && maps.EqualFunc(a.lastGood, b.lastGood, given.equal) &&
		maps.EqualFunc(a.tokens, b.tokens, Token.equal)
}

func sameConfig(a, b dockerconfig.Config) bool {
	return slices.EqualFunc(a.Entries(), b.Entries(), dockerconfig.Entry.Equal)
}

// readState reads the state of a resource. One that cannot be decoded counts as missing.
func (t *term) readState(ctx context.Context, uid types.UID) (state, error) {
	ctx, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	missing := state{incomplete: true}
	secret, err := t.core.Secrets(t.config.Namespace).Get(ctx, impsync.StateName(uid), metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return missing, nil
	case err != nil:
		return missing, passing("read the state Secret", err)
	}
	s, err := decodeState(secret.Data[stateKey])
	if err != nil {
		t.log.Warn("cannot read a state Secret, going on without it", "secret", secret.Name, "error", err)
		missing.uid, missing.resourceVersion = secret.UID, secret.ResourceVersion
		return missing, nil
	}
	s.uid, s.resourceVersion = secret.UID, secret.ResourceVersion
	return s, nil
}

// writeState writes a state over the one that is known, where none is over none, and returns
// its UID and resourceVersion. So no two leaders ever give out one counter: the second
// fails with a conflict, and asks for the Lease.
func (t *term) writeState(ctx context.Context, ref impsync.ResourceRef, raw []byte, known state) (types.UID, string, error) {
	name := impsync.StateName(ref.UID)
	owned := ownSecret(name, impsync.StateType, ref, map[string][]byte{stateKey: raw})
	ctx, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	secrets := t.core.Secrets(t.config.Namespace)
	var written *corev1.Secret
	var err error
	if known.resourceVersion == "" {
		written, err = secrets.Create(ctx, owned, metav1.CreateOptions{FieldManager: impsync.FieldManager})
	} else {
		owned.UID, owned.ResourceVersion = known.uid, known.resourceVersion
		written, err = applySecret(ctx, secrets, owned, impsync.FieldManager)
	}
	switch {
	case apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err):
		if err := t.holdsLease(ctx); err != nil {
			return "", "", err
		}
		if _, getErr := secrets.Get(ctx, name, metav1.GetOptions{}); apierrors.IsNotFound(getErr) {
			return "", "", errStateGone
		}
		return "", "", fmt.Errorf("write Secret %s/%s: %w", t.config.Namespace, name, err)
	case err != nil:
		return "", "", passing(fmt.Sprintf("write Secret %s/%s", t.config.Namespace, name), err)
	}
	return written.UID, written.ResourceVersion, nil
}

// writeRendered writes the rendered Secret of a resource over the one that was there, where
// none was over none: a leader that was superseded must not
// bring the one before back.
func (t *term) writeRendered(ctx context.Context, ref impsync.ResourceRef, data map[string][]byte, was renderedSecret) (*corev1.Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	name := impsync.RenderedName(ref.UID)
	rendered := ownSecret(name, impsync.RenderedType, ref, data)
	rendered.UID, rendered.ResourceVersion = was.uid, cmp.Or(was.resourceVersion, impsync.Absent)
	written, err := applySecret(ctx, t.core.Secrets(t.config.RenderedNamespace), rendered, impsync.FieldManager)
	what := fmt.Sprintf("write Secret %s/%s", t.config.RenderedNamespace, name)
	switch {
	case apierrors.IsConflict(err):
		if err := t.holdsLease(ctx); err != nil {
			return nil, err
		}
		if err := t.rereadRendered(ctx, ref.UID); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%s: %w", what, err)
	case err != nil:
		return nil, passing(what, err)
	}
	return written, nil
}

// ownSecret is one of imps's own Secrets. It carries an owner reference to its resource,
// so that it goes with it even where no coordinator runs.
func ownSecret(name string, secretType corev1.SecretType, owner impsync.ResourceRef, data map[string][]byte) *corev1.Secret {
	return &corev1.Secret{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{
			Name:            name,
			Labels:          map[string]string{impsync.LabelComponent: componentOf(secretType)},
			OwnerReferences: []metav1.OwnerReference{owner.OwnerReference()},
		},
		Type: secretType,
		Data: data,
	}
}

func applySecret(ctx context.Context, secrets corev1client.SecretInterface, secret *corev1.Secret, manager string) (*corev1.Secret, error) {
	body, err := json.Marshal(secret)
	if err != nil {
		return nil, errors.New("encode")
	}
	force := true
	return secrets.Patch(ctx, secret.Name, types.ApplyPatchType, body, metav1.PatchOptions{FieldManager: manager, Force: &force})
}

// passingError is an error of an object of imps's own. That passes, whatever it says: a
// namespace that is missing, say, comes back, and no event tells when.
type passingError struct {
	what string
	err  error
}

func passing(what string, err error) error {
	if errors.Is(err, errLeaseStale) {
		return errLeaseStale // which is to be told apart
	}
	return &passingError{what, err}
}

// Error says what failed. There is no Unwrap: what the error is to others does not count.
func (e *passingError) Error() string { return e.what + ": " + impsync.Explain(e.err) }

func componentOf(secretType corev1.SecretType) string {
	if secretType == impsync.RenderedType {
		return "rendered"
	}
	return "state"
}
