package dockerconfig

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

// seeds are docker configs of both shapes, good and bad.
var seeds = []string{
	``, `null`, `{}`, `[]`, `{"auths":null}`, `{"auths":{}}`, `{"auths":{"r.io":null}}`, `{"auths":{"r.io":{}}}`, `{"auths":[]}`, `{"auths":{}} x`,
	`{"auths":{"https://index.docker.io/v1/":{"auth":"Zm9vOmJhcg=="}},"credsStore":"desktop"}`,
	`{"auths":{"docker.io":{"username":"foo","password":"bar"},"index.docker.io":{"auth":"Zm9vOmJhcg"}}}`,
	`{"AUTHS":{"r.io":{"AUTH":"Zm9vOmJhcg==","Username":"x"}},"auths":{"r.io":{"password":"y"},"r.io":{"email":"e"}}}`,
	`{"auths":{"quay.io/a":{"identitytoken":"i"},"http://quay.io/v2/a":{"registrytoken":"r","email":"e"}}}`,
	`{"auths":{"u:p@r.io":{"username":"a:b","password":"c"},"*.r.io:5000/x":{"auth":"Zm9vOv8="},"a b":{"username":"u"}}}`,
	`{"auths":{"r.io/\u0000<é>":{"password":"\ud800\u2028&"}}}`,
	`{"https://quay.io/v1/":{"auth":"Zm9vOmJhcg=="},".dockercfg":{"username":"u"}}`,
	`{"auths":{"r.io":{"auth":"Zm9v"}}}`, `{"auths":{"r.io":{"auth":"Og=="}}}`, `{"auths":{"r.io":{"auth":1}}}`,
}

func FuzzParse(f *testing.F) {
	for _, seed := range seeds {
		f.Add([]byte(seed), false)
		f.Add([]byte(seed), true)
	}
	f.Fuzz(func(t *testing.T, content []byte, older bool) {
		parse := parseJSON
		if older {
			parse = parseCfg
		}
		config, notes, err := parse(string(content))
		for _, text := range append(notes, fmt.Sprint(err)) {
			require.LessOrEqual(t, len(text), 1000)
			require.True(t, utf8.ValidString(text))
			require.NotContains(t, text, "\n")
		}
		require.LessOrEqual(t, len(notes), 11)
		if err != nil {
			require.Empty(t, config.Entries())
			require.Empty(t, notes)
			return
		}
		rendered, err := config.Render()
		if err != nil {
			require.ErrorIs(t, err, ErrTooLarge)
			return
		}
		again, notes, err := parseJSON(rendered.Reveal())
		require.NoError(t, err)
		for _, note := range notes {
			require.Contains(t, note, "kubelets do not read tokens")
		}
		require.Equal(t, plain(config.Entries()), plain(again.Entries()))
		renderedAgain, err := again.Render()
		require.NoError(t, err)
		require.Equal(t, rendered.Reveal(), renderedAgain.Reveal())
	})
}

// FuzzParseTellsNoValue edits, at one place, a config that holds a canary wherever a value may stand. One edit cannot
// make a value a key, and keys are told.
func FuzzParseTellsNoValue(f *testing.F) {
	const key = `{"auths":{"https://u:` + canary + `@r.io/a":`
	const rest = `{"username":"` + canary + `","password":"` + canary + `","auth":"` + canary + `","identitytoken":"` + canary +
		`","registrytoken":"` + canary + `","email":"` + canary + `","more":["` + canary + `"]}},"credsStore":"` + canary + `"}`
	for _, insert := range []string{``, `"`, `}`, `\`, `,`, `:`, `null`, "\xff", `{"a":`, `"},"b":{"auth":"`, `@`, `#`, `/`} {
		f.Add(uint16(0), uint16(0), insert)
		f.Add(uint16(25), uint16(1), insert)
		f.Add(uint16(100), uint16(7), insert)
		f.Add(uint16(strings.Index(rest, `"auth":`)+8), uint16(len(canary)), insert)
	}
	f.Fuzz(func(t *testing.T, at, drop uint16, insert string) {
		if strings.Contains(insert, canary) {
			t.Skip("the canary may be a key now")
		}
		start := min(int(at), len(rest))
		end := min(start+int(drop), len(rest))
		content := key + rest[:start] + insert + rest[end:]
		for _, parse := range []func(string) (Config, []string, error){parseJSON, parseCfg} {
			config, notes, err := parse(content)
			require.NotContains(t, fmt.Sprintf("%v %#v %q %+v %#v %q", err, err, notes, config, config, config.Registries()), canary)
		}
	})
}

func FuzzMerge(f *testing.F) {
	for i, seed := range seeds {
		f.Add([]byte(seed), []byte(seeds[(i+5)%len(seeds)]), []byte(seeds[(i+6)%len(seeds)]))
	}
	f.Fuzz(func(t *testing.T, first, second, third []byte) {
		a, _, _ := parseJSON(string(first))
		b, _, _ := parseJSON(string(second))
		c, _, _ := parseCfg(string(third))
		merged := Merge(a, b, c)

		all := merged.Entries()
		for _, e := range c.Entries() {
			require.True(t, slices.ContainsFunc(all, e.Equal), "the last config's entries are all there")
		}
		for i, e := range all {
			inLast := slices.ContainsFunc(c.entries, func(l Entry) bool { return l.identity() == e.identity() })
			require.Equal(t, inLast, slices.ContainsFunc(c.entries, e.Equal), "nobody else has an entry for one of its registries")
			require.False(t, slices.ContainsFunc(all[i+1:], func(o Entry) bool { return o.Key.Equal(e.Key) }), "keys are unique")
		}
		for _, e := range slices.Concat(a.entries, b.entries) {
			require.True(t, slices.ContainsFunc(all, func(o Entry) bool { return o.identity() == e.identity() }), "no registry is lost")
		}
		for _, same := range []Config{Merge(merged, merged), Merge(merged, c), Merge(Merge(a, b), c), Merge(a, Merge(b, c)), Merge(Config{}, merged)} {
			require.Equal(t, plain(all), plain(same.Entries()))
		}
	})
}

func FuzzMatch(f *testing.F) {
	for _, key := range []string{"docker.io", "https://index.docker.io/v1/", "*.io", "r.io:5000/a", "[::1]:1", "u:p@r.io", "r.io/%41%2541", "[*", "localhost", "\x97", "%97"} {
		for _, image := range []string{"nginx", "a/b:1", "r.io:5000/a/b", "[::1]:1/x", "localhost/x", "r.io/x@sha256:" + strings.Repeat("a", 64), "A.b/c", ""} {
			f.Add(key, image)
		}
	}
	f.Fuzz(func(t *testing.T, key, image string) {
		index := want{key: hubIndex, username: "u"}.entry()
		entries := []Entry{index}
		if _, err := Normalize(key); err == nil && len(key) <= MaxKeyBytes && utf8.ValidString(key) {
			entries = append(entries, want{key: key, username: "u"}.entry())
		}
		config, err := New(entries...)
		require.NoError(t, err)
		repository, imageErr := Repository(image)
		found, err := config.Match(image)
		if imageErr != nil {
			require.ErrorIs(t, err, ErrImage)
			require.Empty(t, found)
			return
		}
		require.NoError(t, err)
		require.True(t, slices.IsSortedFunc(found, compareEntries))
		host, path, _ := strings.Cut(repository, "/")
		if host == hub {
			require.NotEmpty(t, found, "Docker Hub's key serves all its images")
		}

		// A repository as key matches itself, but where a kubelet takes the key for something else.
		normal, err := Normalize(repository)
		if strings.HasPrefix(path, "v1/") || strings.HasPrefix(path, "v2/") || strings.HasPrefix(host, "[") || len(repository) > MaxKeyBytes {
			return
		}
		require.NoError(t, err)
		require.Equal(t, repository, normal)
		itself := want{key: repository, username: "u"}.entry()
		config, err = New(itself)
		require.NoError(t, err)
		found, err = config.Match(image)
		require.NoError(t, err)
		require.True(t, slices.EqualFunc([]Entry{itself}, found, Entry.Equal))
	})
}
