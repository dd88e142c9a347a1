package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

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
		"the last counter": {counter: 1 << 63},
		"sources": {counter: 7, lastGood: map[string]dockerconfig.Config{
			"ns.a": configOf(t, "r.io=1", "s.io=2"), "ns.empty": {}, "ecr.1.dkr.ecr.eu-central-1.amazonaws.com": tokens, "ns.odd": odd,
		}},
	} {
		raw, err := encodeState(s)
		require.NoError(t, err, name)
		got, err := decodeState(raw)
		require.NoError(t, err, name)
		require.True(t, sameState(s, got), name)
		require.False(t, got.missing)
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
		return state{counter: counter, lastGood: map[string]dockerconfig.Config{key: configOf(t, registries...)}}
	}
	a := with(1, "a", "r.io=1", "s.io=2")
	missing := with(1, "a", "r.io=1", "s.io=2")
	missing.missing = true
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
		"no sources":          {state{counter: 1}, false},
		"the same, not there": {missing, false},
	} {
		require.Equal(t, test.want, sameState(test.known, a), name)
	}
	require.True(t, sameState(state{}, state{lastGood: map[string]dockerconfig.Config{}}))
}

func TestAStateThatFitsIntoNoSecretIsAnError(t *testing.T) {
	t.Parallel()
	huge := configOf(t, "r.io="+canary+strings.Repeat("x", corev1.MaxSecretSize/3))
	_, err := encodeState(state{lastGood: map[string]dockerconfig.Config{"a": huge, "b": huge}})
	require.ErrorContains(t, err, "too large")
	requireSilent(t, err.Error())
	tooHuge := configOf(t, "r.io="+canary+strings.Repeat("x", corev1.MaxSecretSize))
	_, err = encodeState(state{lastGood: map[string]dockerconfig.Config{"ns.a": tooHuge}})
	require.ErrorContains(t, err, "ns.a")
	requireSilent(t, err.Error())
}

func TestAStateThatIsNoneIsRefusedWithoutBeingQuoted(t *testing.T) {
	t.Parallel()
	entry := func(content string) string {
		raw, err := json.Marshal(map[string]any{"counter": 1, "lastGood": map[string][]byte{"a": []byte(content)}})
		require.NoError(t, err)
		return string(raw)
	}
	for name, raw := range map[string]string{
		"nothing":            ``,
		"no JSON":            canary,
		"another type":       `"` + canary + `"`,
		"a negative counter": `{"counter":-1}`,
		"entries in clear":   `{"counter":1,"lastGood":{"a":"` + canary + `!"}}`,
		"no docker config":   entry(canary),
		"a bad entry":        entry(`{"auths":{"r.io":{"auth":"` + canary + `!"}}}`),
	} {
		got, err := decodeState([]byte(raw))
		require.Error(t, err, name)
		require.Zero(t, got, name)
		for e := err; e != nil; e = errors.Unwrap(e) {
			requireSilent(t, fmt.Sprintf("%v %+v %#v", e, e, e))
		}
	}
}

func FuzzDecodeState(f *testing.F) {
	raw, err := encodeState(state{counter: 7})
	require.NoError(f, err)
	f.Add(raw)
	for _, seed := range []string{
		``, `null`, `{}`, `{"counter":18446744073709551615,"lastGood":null}`,
		`{"counter":1,"lastGood":{"a":"eyJhdXRocyI6eyJyLmlvIjp7ImF1dGgiOiJkVHB3In19fQ==","b":null}}`,
		`{"counter":1,"lastGood":{"a":"eyJhdXRocyI6bnVsbH0=","":""}}`, `{"counter":1,"lastGood":{"a":"` + canary + `"}}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := decodeState(raw)
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
		require.True(t, sameState(s, again))
		twice, err := encodeState(again)
		require.NoError(t, err)
		require.Equal(t, string(encoded), string(twice))
	})
}

func TestOwnSecretsSayWhatTheyAre(t *testing.T) {
	t.Parallel()
	require.Equal(t, "rendered", componentOf(impsync.RenderedType))
	require.Equal(t, "state", componentOf(impsync.StateType))
}
