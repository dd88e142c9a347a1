package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// stateKey is the key of a state Secret's data.
const stateKey = "state"

// state is what a coordinator remembers of a resource beyond its term. Only coordinators
// can read it.
type state struct {
	// counter is the highest that any target was rendered with.
	counter uint64
	// lastGood are the last good entries of each source.
	lastGood map[string]dockerconfig.Config
	// missing: there was no state Secret, or none that could be read.
	missing bool
}

// stateRecord is the JSON of a state.
type stateRecord struct {
	Counter  uint64            `json:"counter"`
	LastGood map[string][]byte `json:"lastGood"`
}

func encodeState(s state) ([]byte, error) {
	record := stateRecord{Counter: s.counter, LastGood: map[string][]byte{}}
	for key, config := range s.lastGood {
		rendered, err := config.Render()
		if err != nil {
			return nil, fmt.Errorf("last good credentials of %s: %w", key, err)
		}
		record.LastGood[key] = []byte(rendered.Reveal())
	}
	raw, err := json.Marshal(record)
	if err != nil {
		return nil, errors.New("encode state")
	}
	if len(raw) > corev1.MaxSecretSize {
		return nil, fmt.Errorf("the credentials of all sources are too large: %d bytes, and a Secret holds at most %d; list fewer registries", len(raw), corev1.MaxSecretSize)
	}
	return raw, nil
}

func decodeState(raw []byte) (state, error) {
	var record stateRecord
	if err := json.Unmarshal(raw, &record); err != nil {
		return state{}, errors.New("state: not valid JSON")
	}
	s := state{counter: record.Counter, lastGood: map[string]dockerconfig.Config{}}
	for key, value := range record.LastGood {
		config, _, err := dockerconfig.Parse(string(corev1.SecretTypeDockerConfigJson), map[string][]byte{corev1.DockerConfigJsonKey: value})
		if err != nil {
			return state{}, fmt.Errorf("state of %s: %w", key, err)
		}
		s.lastGood[key] = config
	}
	return s, nil
}

// sameState reports whether writing b over a would change nothing.
func sameState(a, b state) bool {
	return !a.missing && a.counter == b.counter && maps.EqualFunc(a.lastGood, b.lastGood, sameConfig)
}

func sameConfig(a, b dockerconfig.Config) bool {
	return equalEntries(a.Entries(), b.Entries())
}

func equalEntries(a, b []dockerconfig.Entry) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !a[i].Equal(b[i]) {
			return false
		}
	}
	return true
}

// readState reads the state of a resource. One that cannot be decoded counts as missing.
func (t *term) readState(ctx context.Context, uid types.UID) (state, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	missing := state{missing: true, lastGood: map[string]dockerconfig.Config{}}
	secret, err := t.core.Secrets(t.config.Namespace).Get(ctx, impsync.StateName(uid), metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return missing, nil
	case err != nil:
		return missing, fmt.Errorf("read the state Secret: %w", err)
	}
	s, err := decodeState(secret.Data[stateKey])
	if err != nil {
		t.log.Warn("cannot read a state Secret, going on without it", "secret", secret.Name, "error", err)
		return missing, nil
	}
	return s, nil
}

func (t *term) writeState(ctx context.Context, ref impsync.ResourceRef, raw []byte) error {
	_, err := t.applyOwn(ctx, t.config.Namespace, impsync.StateName(ref.UID), impsync.StateType, ref, map[string][]byte{stateKey: raw})
	return err
}

// applyOwn writes one of imps's own Secrets. It carries an owner reference to its
// resource, so that it goes with it even where no coordinator runs.
func (t *term) applyOwn(ctx context.Context, namespace, name string, secretType corev1.SecretType, owner impsync.ResourceRef, data map[string][]byte) (*corev1.Secret, error) {
	body, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Secret",
		"metadata": map[string]any{
			"name":            name,
			"labels":          map[string]string{impsync.LabelComponent: componentOf(secretType)},
			"ownerReferences": []metav1.OwnerReference{owner.OwnerReference()},
		},
		"type": secretType,
		"data": data,
	})
	if err != nil {
		return nil, fmt.Errorf("encode Secret %s", name)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	force := true
	written, err := t.core.Secrets(namespace).Patch(ctx, name, types.ApplyPatchType, body, metav1.PatchOptions{FieldManager: impsync.FieldManager, Force: &force})
	if err != nil {
		return nil, fmt.Errorf("write Secret %s/%s: %w", namespace, name, err)
	}
	return written, nil
}

func componentOf(secretType corev1.SecretType) string {
	if secretType == impsync.RenderedType {
		return "rendered"
	}
	return "state"
}
