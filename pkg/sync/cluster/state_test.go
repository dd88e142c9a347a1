package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

func TestStateIsEncodedAndDecoded(t *testing.T) {
	t.Parallel()
	tokens, err := dockerconfig.New(dockerconfig.Entry{
		Key: dockerconfig.NewSensitive("https://index.docker.io/v1/"), IdentityToken: dockerconfig.NewSensitive("i"),
		RegistryToken: dockerconfig.NewSensitive("r"), Email: dockerconfig.NewSensitive("e"),
	})
	require.NoError(t, err)
	odd, err := dockerconfig.New(dockerconfig.Entry{
		Key: dockerconfig.NewSensitive("r.io/<é>"), Username: dockerconfig.NewSensitive("u:v"), Password: dockerconfig.NewSensitive(`"\ &` + canary),
	})
	require.NoError(t, err)
	for name, s := range map[string]state{
		"nothing":          {},
		"a counter":        {counter: 42},
		"incomplete":       {counter: 42, incomplete: true},
		"the last counter": {counter: 1 << 63},
		"sources": {counter: 7, lastGood: map[string]given{
			"ns.a": {config: configOf(t, "r.io=1", "s.io=2")}, "ns.empty": {}, "ns.tokens": {config: tokens}, "ns.odd": {config: odd},
			"ecr.1.dkr.ecr.eu-central-1.amazonaws.com": {configOf(t, "1.dkr.ecr.eu-central-1.amazonaws.com=t"), map[string]time.Time{"1.dkr.ecr.eu-central-1.amazonaws.com": noon}},
		}, tokens: map[string]Token{"id": tokenOf(canary, 12), "other": {Principal: "arn:aws:iam::111111111111:role/x"}}},
	} {
		raw, err := encodeState(s)
		require.NoError(t, err, name)
		got, err := decodeState(raw)
		require.NoError(t, err, name)
		s.resourceVersion = "5" // as it was read
		require.True(t, sameState(s, got), name)
		require.Equal(t, s.incomplete, got.incomplete)
		require.Len(t, got.lastGood, len(s.lastGood))
		for range 10 {
			again, err := encodeState(s)
			require.NoError(t, err)
			require.Equal(t, string(raw), string(again), "the same state gives the same bytes")
		}
		requireSilent(t, fmt.Sprintf("%v %+v %#v", s, s, s))
	}
}

func TestSameState(t *testing.T) {
	t.Parallel()
	with := func(counter uint64, key string, registries ...string) state {
		return state{counter: counter, lastGood: map[string]given{key: {config: configOf(t, registries...)}}, resourceVersion: "5"}
	}
	a := with(1, "a", "r.io=1", "s.io=2")
	incomplete := with(1, "a", "r.io=1", "s.io=2")
	incomplete.incomplete = true
	absent := with(1, "a", "r.io=1", "s.io=2")
	absent.resourceVersion = ""
	for name, test := range map[string]struct {
		known state
		want  bool
	}{
		"the same":            {with(1, "a", "r.io=1", "s.io=2"), true},
		"another order":       {with(1, "a", "s.io=2", "r.io=1"), true},
		"another counter":     {with(2, "a", "r.io=1", "s.io=2"), false},
		"another source":      {with(1, "b", "r.io=1", "s.io=2"), false},
		"another password":    {with(1, "a", "r.io=1", "s.io=3"), false},
		"one registry less":   {with(1, "a", "r.io=1"), false},
		"no sources":          {state{counter: 1, resourceVersion: "5"}, false},
		"incomplete":          {incomplete, false},
		"the same, not there": {absent, false},
	} {
		require.Equal(t, test.want, sameState(test.known, a), name)
	}
	require.True(t, sameState(state{resourceVersion: "5"}, state{lastGood: map[string]given{}}))
}

func TestAStateThatFitsIntoNoSecretIsAnError(t *testing.T) {
	t.Parallel()
	huge := configOf(t, "r.io="+canary+noise(corev1.MaxSecretSize/3))
	_, err := encodeState(state{lastGood: map[string]given{"a": {config: huge}, "b": {config: huge}}})
	require.ErrorContains(t, err, "too large")
	requireSilent(t, err.Error())
	tooHuge := configOf(t, "r.io="+canary+strings.Repeat("x", corev1.MaxSecretSize))
	_, err = encodeState(state{lastGood: map[string]given{"ns.a": {config: tooHuge}}})
	require.ErrorContains(t, err, "ns.a")
	requireSilent(t, err.Error())
}

func TestAStateThatIsNoneIsRefusedWithoutBeingQuoted(t *testing.T) {
	t.Parallel()
	entry := func(content string) string {
		raw, err := json.Marshal(map[string]any{"counter": 1, "lastGood": map[string]any{"a": map[string][]byte{"config": []byte(content)}}})
		require.NoError(t, err)
		return string(raw)
	}
	for name, raw := range map[string]string{
		"nothing":            ``,
		"no JSON":            canary,
		"another type":       `"` + canary + `"`,
		"a negative counter": `{"counter":-1}`,
		"entries in clear":   `{"counter":1,"lastGood":{"a":{"config":"` + canary + `!"}}}`,
		"no docker config":   entry(canary),
		"a bad entry":        entry(`{"auths":{"r.io":{"auth":"` + canary + `!"}}}`),
	} {
		_, err := decodeState([]byte(raw))
		require.Error(t, err, name+", and not compressed")
		got, err := decodeState(impsync.Compress([]byte(raw)))
		require.Error(t, err, name)
		require.Zero(t, got, name)
		for e := err; e != nil; e = errors.Unwrap(e) {
			requireSilent(t, fmt.Sprintf("%v %+v %#v", e, e, e))
		}
	}
}

func FuzzDecodeState(f *testing.F) {
	for _, seed := range []string{
		``, `null`, `{}`, `{"counter":7}`, `{"counter":18446744073709551615,"lastGood":null}`,
		`{"counter":1,"lastGood":{"a":{"config":"eyJhdXRocyI6eyJyLmlvIjp7ImF1dGgiOiJkVHB3In19fQ==","expiries":{"r.io":"2026-03-01T12:00:00Z"}},"b":null}}`,
		`{"counter":1,"lastGood":{"a":{"config":"eyJhdXRocyI6bnVsbH0="},"":{}}}`, `{"counter":1,"lastGood":{"a":"` + canary + `"}}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		if s, err := decodeState(raw); err != nil {
			require.Zero(t, s)
		}
		s, err := decodeState(impsync.Compress(raw))
		if err != nil {
			require.Zero(t, s)
			return
		}
		encoded, err := encodeState(s)
		if err != nil {
			require.ErrorContains(t, err, "too large")
			return
		}
		again, err := decodeState(encoded)
		require.NoError(t, err)
		s.resourceVersion = "5" // as it was read
		require.True(t, sameState(s, again))
		twice, err := encodeState(again)
		require.NoError(t, err)
		require.Equal(t, string(encoded), string(twice))
	})
}

// A namespace of our own that is missing is no reason to give a resource up.
func TestErrorsOfOwnObjectsPassWhateverTheySay(t *testing.T) {
	t.Parallel()
	for _, err := range []error{
		apierrors.NewNotFound(corev1.Resource("namespaces"), "imps-rendered"), apierrors.NewForbidden(corev1.Resource("secrets"), "x", errors.New("no")),
		apierrors.NewInvalid(corev1.SchemeGroupVersion.WithKind("Secret").GroupKind(), "x", field.ErrorList{field.Invalid(field.NewPath("data"), canary, "x")}),
		errSuperseded,
	} {
		passes := passing("write Secret x", err)
		require.Equal(t, impsync.ClassRetry, impsync.ClassifyError(passes))
		require.Equal(t, "write Secret x: "+impsync.Explain(err), passes.Error())
		require.NotErrorIs(t, passes, err)
		requireSilent(t, passes.Error())
	}
}

func TestOwnSecretsSayWhatTheyAre(t *testing.T) {
	t.Parallel()
	ref := impsync.ResourceRef{Name: "a", UID: "uid-a"}
	s := ownSecret("x", impsync.StateType, ref, map[string][]byte{"state": []byte("y")})
	require.Equal(t, &corev1.Secret{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{
			Name: "x", Labels: map[string]string{"images.banzaicloud.io/component": "state"}, OwnerReferences: []metav1.OwnerReference{ref.OwnerReference()},
		},
		Type: "images.banzaicloud.io/state", Data: map[string][]byte{"state": []byte("y")},
	}, s)
	require.Equal(t, "rendered", componentOf(impsync.RenderedType))
	require.Equal(t, "state", componentOf(impsync.StateType))
}
