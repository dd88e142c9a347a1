package dockerconfig

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTheLastListedWinsARegistry(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		configs []string
		want    []want
	}{
		"nothing merges to nothing":       {nil, []want{}},
		"different registries are united": {[]string{`"a.io":{"username":"1"}`, ``, `"b.io":{"username":"2"}`}, []want{{key: "b.io", username: "2"}, {key: "a.io", username: "1"}}},
		"the same spelling": {
			[]string{`"a.io":{"username":"1","password":"p","email":"e"}`, `"a.io":{"username":"2"}`}, []want{{key: "a.io", username: "2"}},
		},
		"also if it was listed before that": {
			[]string{`"a.io":{"username":"1"}`, `"a.io":{"username":"2"}`, `"a.io":{"username":"1"}`}, []want{{key: "a.io", username: "1"}},
		},
		"a token alone wins as well": {
			[]string{`"a.io":{"username":"1"}`, `"a.io":{"identitytoken":"i"}`}, []want{{key: "a.io", identity: "i"}},
		},
		"an entry without credential wins nothing": {
			[]string{`"a.io":{"username":"1"}`, `"a.io":{}`}, []want{{key: "a.io", username: "1"}},
		},
		"another spelling of the registry, and the winner's stays": {
			[]string{`"https://quay.io/v1/":{"username":"1"},"http://quay.io":{"username":"1"}`, `"quay.io":{"username":"2"}`, `"https://quay.io/v2/":{"username":"3"}`},
			[]want{{key: "https://quay.io/v2/", username: "3"}},
		},
		"another spelling of a path": {
			[]string{`"https://quay.io/v2/acme":{"username":"1"}`, `"quay.io/acme":{"username":"2"}`}, []want{{key: "quay.io/acme", username: "2"}},
		},
		"user information in a key does not make another registry": {
			[]string{`"u:p@quay.io":{"username":"1"}`, `"quay.io":{"username":"2"}`}, []want{{key: "quay.io", username: "2"}},
		},
		"Docker Hub's index after its name": {
			[]string{`"docker.io":{"username":"1"}`, `"https://index.docker.io/v1/":{"username":"2"}`}, []want{{key: "https://index.docker.io/v1/", username: "2"}},
		},
		"Docker Hub's name after its index": {
			[]string{`"https://index.docker.io/v1/":{"username":"1"}`, `"docker.io":{"username":"2"}`}, []want{{key: "docker.io", username: "2"}},
		},
		"two spellings in one source both stay, and both lose": {
			[]string{`"docker.io":{"username":"1"},"index.docker.io":{"username":"2"}`, `"quay.io":{"username":"1"},"https://quay.io":{"username":"2"}`, `"quay.io/v2/":{"username":"3"}`},
			[]want{{key: "quay.io/v2/", username: "3"}, {key: "index.docker.io", username: "2"}, {key: "docker.io", username: "1"}},
		},
		"paths, ports, case, trailing slashes and globs make different registries": {
			[]string{
				`"a.io/x":{"username":"1"},"a.io:443":{"username":"1"},"A.io":{"username":"1"},"a.io/x/":{"username":"1"},"*.io":{"username":"1"},"a.io/v1":{"username":"1"}`,
				`"a.io":{"username":"2"}`,
			},
			[]want{
				{key: "a.io:443", username: "1"}, {key: "a.io/x/", username: "1"}, {key: "a.io/x", username: "1"}, {key: "a.io/v1", username: "1"},
				{key: "a.io", username: "2"}, {key: "A.io", username: "1"}, {key: "*.io", username: "1"},
			},
		},
		"a path below Docker Hub's index, which kubelets never use, does not replace one below its name": {
			[]string{`"docker.io/acme":{"username":"1"}`, `"https://index.docker.io/v1/acme":{"username":"2"}`},
			[]want{{key: "https://index.docker.io/v1/acme", username: "2"}, {key: "docker.io/acme", username: "1"}},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var configs []Config
			for _, auths := range test.configs {
				configs = append(configs, mustParse(t, auths))
			}
			merged := Merge(configs...)
			require.Equal(t, test.want, plain(merged.Entries()))
			require.Equal(t, test.want, plain(Merge(merged, merged).Entries()), "merging is idempotent")
		})
	}
}

func TestMergeLeavesItsInputsAlone(t *testing.T) {
	t.Parallel()
	a, b := mustParse(t, `"a.io":{"username":"1"},"b.io":{"username":"1"}`), mustParse(t, `"a.io":{"username":"2"}`)
	before := plain(a.Entries())
	merged := Merge(a, b)
	taken := merged.Entries()
	taken[0] = Entry{}
	require.Equal(t, before, plain(a.Entries()))
	require.Equal(t, []want{{key: "b.io", username: "1"}, {key: "a.io", username: "2"}}, plain(merged.Entries()), "Entries gives a copy")
}

func TestNewTakesCredentialsFromElsewhere(t *testing.T) {
	t.Parallel()
	config, err := New(
		want{key: "1.dkr.ecr.eu-central-1.amazonaws.com", username: "AWS", password: "old"}.entry(),
		want{key: "a.io", identity: "i"}.entry(),
		want{key: "1.dkr.ecr.eu-central-1.amazonaws.com", username: "AWS", password: "new"}.entry(),
	)
	require.NoError(t, err)
	require.Equal(t, []want{{key: "a.io", identity: "i"}, {key: "1.dkr.ecr.eu-central-1.amazonaws.com", username: "AWS", password: "new"}}, plain(config.Entries()))
	found, err := config.Match("1.dkr.ecr.eu-central-1.amazonaws.com/app:1")
	require.NoError(t, err)
	require.Len(t, found, 1)

	config, err = New()
	require.NoError(t, err)
	require.Empty(t, config.Entries())
}

func TestNewRefusesWhatNoConfigCanHold(t *testing.T) {
	t.Parallel()
	many := make([]Entry, MaxEntries+1)
	for name, test := range map[string]struct {
		entries []Entry
		class   error
		message string
	}{
		"too many entries": {many, ErrTooLarge, "docker config too large: 10001 registries, the limit is 10000"},
		"a key too long": {
			[]Entry{want{key: "u:" + canary + "@" + strings.Repeat("a", MaxKeyBytes), username: "u"}.entry()}, ErrTooLarge,
			`docker config too large: registry "` + strings.Repeat("a", 128) + `..." has 1040 bytes, the limit is 1024`,
		},
		"no host":       {[]Entry{want{key: "/x", username: "u"}.entry()}, ErrRegistry, `not a registry: "/x"`},
		"no key":        {[]Entry{want{username: "u"}.entry()}, ErrRegistry, `not a registry: ""`},
		"no credential": {[]Entry{want{key: "u:" + canary + "@a.io", email: "e"}.entry()}, ErrMalformed, `malformed docker config: registry "a.io" has no credential`},
		"a username with a colon beside bytes that need auth": {
			[]Entry{want{key: "a.io", username: "a:b", password: canary + "\xff"}.entry()}, ErrMalformed,
			`malformed docker config: registry "a.io" has bytes that are not UTF-8 where JSON has no place for them`,
		},
		"a token that JSON cannot hold": {
			[]Entry{want{key: "a.io", identity: canary + "\xff"}.entry()}, ErrMalformed,
			`malformed docker config: registry "a.io" has bytes that are not UTF-8 where JSON has no place for them`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config, err := New(test.entries...)
			require.ErrorIs(t, err, test.class)
			require.EqualError(t, err, test.message)
			require.Empty(t, config.Entries())
		})
	}
}

func TestRegistriesAreSortedAsWrittenWithoutUserInformation(t *testing.T) {
	t.Parallel()
	config := mustParse(t, `"z.io":{"username":"u"},"https://index.docker.io/v1/":{"username":"u"},"https://u:`+canary+`@a.io/x?`+canary+`":{"username":"u"},"*.b.io:5000/y":{"username":"u"}`)
	require.Equal(t, []string{"*.b.io:5000/y", "a.io/x", "https://index.docker.io/v1/", "z.io"}, config.Registries())
	require.Equal(t, []string{}, Config{}.Registries())
	require.NotContains(t, fmt.Sprintf("%v %+v %#v", config, config, config.Entries()), canary)
}

func TestEntriesAreEqualIfAllTheirFieldsAre(t *testing.T) {
	t.Parallel()
	full := want{"k", "u", "p", "i", "r", "e"}
	require.True(t, full.entry().Equal(full.entry()))
	for i, other := range []want{
		{"x", "u", "p", "i", "r", "e"},
		{"k", "x", "p", "i", "r", "e"},
		{"k", "u", "x", "i", "r", "e"},
		{"k", "u", "p", "x", "r", "e"},
		{"k", "u", "p", "i", "x", "e"},
		{"k", "u", "p", "i", "r", "x"},
	} {
		require.False(t, full.entry().Equal(other.entry()), i)
	}
}
