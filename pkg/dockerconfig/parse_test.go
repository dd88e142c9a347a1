package dockerconfig

import (
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// want is an entry in plain text.
type want struct {
	key, username, password, identity, registry, email string
}

func (w want) entry() Entry {
	return Entry{
		Key: NewSensitive(w.key), Username: NewSensitive(w.username), Password: NewSensitive(w.password),
		IdentityToken: NewSensitive(w.identity), RegistryToken: NewSensitive(w.registry), Email: NewSensitive(w.email),
	}
}

// plain is the opposite of want.entry; tests compare in plain text so that a failure can be read.
func plain(entries []Entry) []want {
	all := []want{}
	for _, e := range entries {
		all = append(all, want{
			e.Key.Reveal(), e.Username.Reveal(), e.Password.Reveal(),
			e.IdentityToken.Reveal(), e.RegistryToken.Reveal(), e.Email.Reveal(),
		})
	}
	return all
}

func parseJSON(content string) (Config, []string, error) {
	return Parse(TypeDockerConfigJSON, map[string][]byte{KeyDockerConfigJSON: []byte(content)})
}

func parseCfg(content string) (Config, []string, error) {
	return Parse(TypeDockercfg, map[string][]byte{KeyDockercfg: []byte(content)})
}

// mustParse returns a config of {"auths": {<auths>}}.
func mustParse(t testing.TB, auths string) Config {
	t.Helper()
	config, _, err := parseJSON(`{"auths":{` + auths + `}}`)
	require.NoError(t, err)
	return config
}

func b64(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

func TestParseReadsWhatAKubeletReads(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		auths string // inside {"auths":{...}}, and for the older type inside {...}
		want  []want
		notes []string // for the newer type
	}{
		"an empty object is valid and empty": {"", []want{}, nil},
		"auth alone gives username and password": {
			`"r.io":{"auth":"Zm9vOmJhcg=="}`, []want{{key: "r.io", username: "foo", password: "bar"}}, nil,
		},
		"auth needs no padding": {
			`"r.io":{"auth":"Zm9vOmJhcg"}`, []want{{key: "r.io", username: "foo", password: "bar"}}, nil,
		},
		"line breaks inside and after auth are skipped": {
			`"r.io":{"auth":"Zm9vOm\r\nJhcg==\n"}`, []want{{key: "r.io", username: "foo", password: "bar"}}, nil,
		},
		"username and password alone are enough": {
			`"r.io":{"username":"foo","password":"bar"}`, []want{{key: "r.io", username: "foo", password: "bar"}}, nil,
		},
		"an empty auth is as no auth": {
			`"r.io":{"auth":"","username":"foo","password":"bar"}`, []want{{key: "r.io", username: "foo", password: "bar"}}, nil,
		},
		"agreeing auth and pair are no matter for a note": {
			`"r.io":{"auth":"Zm9vOmJhcg==","username":"foo","password":"bar"}`, []want{{key: "r.io", username: "foo", password: "bar"}}, nil,
		},
		"auth wins over a pair that differs": {
			`"r.io":{"auth":"Zm9vOmJhcg==","username":"foo","password":"old"},"s.io":{"auth":"Zm9vOmJhcg==","username":"old"}`,
			[]want{{key: "s.io", username: "foo", password: "bar"}, {key: "r.io", username: "foo", password: "bar"}},
			[]string{
				`auths["r.io"]: username and password differ from auth, and auth wins`,
				`auths["s.io"]: username and password differ from auth, and auth wins`,
			},
		},
		"a password may hold colons and NULs": {
			`"r.io":{"auth":"` + b64("foo:b:a:r\x00\x00") + `"}`, []want{{key: "r.io", username: "foo", password: "b:a:r\x00\x00"}}, nil,
		},
		"a username without password is a credential": {
			`"r.io":{"username":"foo"}`, []want{{key: "r.io", username: "foo"}}, nil,
		},
		"a password without username is a credential": {
			`"r.io":{"auth":"` + b64(":bar") + `"}`, []want{{key: "r.io", password: "bar"}}, nil,
		},
		"bytes that are not UTF-8 come through auth unchanged": {
			`"r.io":{"auth":"` + b64("foo:\xff\xfe") + `"}`, []want{{key: "r.io", username: "foo", password: "\xff\xfe"}}, nil,
		},
		"tokens and email are carried": {
			`"r.io":{"auth":"Zm9vOmJhcg==","identitytoken":"i","registrytoken":"r","email":"e@x"}`,
			[]want{{"r.io", "foo", "bar", "i", "r", "e@x"}}, nil,
		},
		"an entry with a token alone is carried, with a note": {
			`"r.io":{"identitytoken":"i"},"s.io":{"registrytoken":"r"}`,
			[]want{{key: "s.io", registry: "r"}, {key: "r.io", identity: "i"}},
			[]string{
				`auths["r.io"] has a token and no password: kubelets do not read tokens`,
				`auths["s.io"] has a token and no password: kubelets do not read tokens`,
			},
		},
		"a token beside a username without password is carried, with a note": {
			`"a.azurecr.io":{"auth":"` + b64("0000:") + `","identitytoken":"i"}`,
			[]want{{key: "a.azurecr.io", username: "0000", identity: "i"}},
			[]string{`auths["a.azurecr.io"] has a token and no password: kubelets do not read tokens`},
		},
		"entries without a credential are left out, with a note": {
			`"a.io":{},"b.io":null,"c.io":{"email":"e"},"d.io":{"auth":"Og=="},"e.io":{"auth":null}`, []want{},
			[]string{
				`auths["a.io"] is left out: it has no credential`, `auths["b.io"] is left out: it has no credential`,
				`auths["c.io"] is left out: it has no credential`, `auths["d.io"] is left out: it has no credential`,
				`auths["e.io"] is left out: it has no credential`,
			},
		},
		"keys that match no image are left out, with a note that holds no user information": {
			`"":{"username":"u"},"a b":{"username":"u"},"https://":{"username":"u"},"https://u:pw@a b/":{"username":"u"},"r.io":{"username":"u"},"r.io/100%25":{"username":"u"}`,
			[]want{{key: "r.io", username: "u"}},
			[]string{
				`auths[""] is left out: its key matches no image`, `auths["a b"] is left out: its key matches no image`,
				`auths["https://"] is left out: its key matches no image`, `auths["a b/"] is left out: its key matches no image`,
				`auths["r.io/100%25"] is left out: its key matches no image`,
			},
		},
		"keys stay as written": {
			`"https://index.docker.io/v1/":{"username":"a"},"docker.io":{"username":"b"},"HTTP://X":{"username":"c"},"r.io/<a>&é":{"username":"d"},"https://u:pw@r.io":{"username":"e"}`,
			[]want{
				{key: "r.io/<a>&é", username: "d"}, {key: "https://u:pw@r.io", username: "e"},
				{key: "https://index.docker.io/v1/", username: "a"}, {key: "docker.io", username: "b"}, {key: "HTTP://X", username: "c"},
			}, nil,
		},
		"field names match in any case": {
			`"r.io":{"AUTH":"Zm9vOmJhcg==","IdentityToken":"i"}`, []want{{key: "r.io", username: "foo", password: "bar", identity: "i"}}, nil,
		},
		"of a repeated key the last counts": {
			`"r.io":{"username":"old","password":"old"},"r.io":{"username":"old","username":"new"}`, []want{{key: "r.io", username: "new"}}, nil,
		},
		"unknown fields of an entry are skipped": {
			`"r.io":{"username":"u","serveraddress":"https://r.io","extra":{"deep":[1,{"x":null}]}}`, []want{{key: "r.io", username: "u"}}, nil,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config, notes, err := parseJSON(`{"auths":{` + test.auths + `}}`)
			require.NoError(t, err)
			require.Equal(t, test.want, plain(config.Entries()))
			require.Equal(t, test.notes, notes)

			older, notes, err := parseCfg(` {` + test.auths + "}\n")
			require.NoError(t, err)
			require.Equal(t, test.want, plain(older.Entries()))
			require.Len(t, notes, len(test.notes))
			for i := range notes {
				require.Equal(t, strings.Replace(test.notes[i], "auths[", ".dockercfg[", 1), notes[i])
			}
		})
	}
}

func TestParseReadsTheTopLevelAsAKubeletDoes(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		content string
		want    []want
		notes   []string
	}{
		"an object without auths is empty": {`{}`, []want{}, nil},
		"auths may be null":                {`{"auths":null}`, []want{}, nil},
		"the whole may be null":            {`null`, []want{}, nil},
		"auths matches in any case":        {`{"Auths":{"r.io":{"username":"u"}}}`, []want{{key: "r.io", username: "u"}}, nil},
		"repeated auths add up": {
			`{"auths":{"r.io":{"username":"u"},"s.io":{"username":"old"}},"auths":{"s.io":{"username":"new"}}}`,
			[]want{{key: "s.io", username: "new"}, {key: "r.io", username: "u"}}, nil,
		},
		"other fields are left out, with a note each": {
			`{"credsStore":"desktop","credHelpers":{"r.io":"ecr-login"},"HttpHeaders":{"X":"` + canary + `"},"auths":{}}`, []want{},
			[]string{
				`the field "HttpHeaders" is left out: kubelets do not use it`,
				`the field "credHelpers" is left out: kubelets do not use it`,
				`the field "credsStore" is left out: kubelets do not use it`,
			},
		},
		"the older shape under the newer type gives notes": {
			`{"https://u:` + canary + `@r.io":{"auth":"Zm9vOmJhcg=="}}`, []want{},
			[]string{`the field "r.io" is left out: kubelets do not use it`},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config, notes, err := parseJSON(test.content)
			require.NoError(t, err)
			require.Equal(t, test.want, plain(config.Entries()))
			require.Equal(t, test.notes, notes)
		})
	}

	config, notes, err := parseCfg(`null`)
	require.NoError(t, err)
	require.Empty(t, config.Entries())
	require.Empty(t, notes)
}

func TestParseErrorsSayWhatIsWrongAndWhere(t *testing.T) {
	t.Parallel()
	const prefix = "malformed docker config: "
	tests := map[string]struct {
		content string
		class   error
		message string
	}{
		"nothing":                   {``, ErrMalformed, prefix + ".dockerconfigjson is not valid JSON at byte 0"},
		"not JSON":                  {`{"auths":{"r.io":x}}`, ErrMalformed, prefix + ".dockerconfigjson is not valid JSON at byte 18"},
		"cut off":                   {`{"auths":{"r.io"`, ErrMalformed, prefix + ".dockerconfigjson is not valid JSON at byte 16"},
		"garbage after it":          {`{"auths":{}} x`, ErrMalformed, prefix + ".dockerconfigjson is not valid JSON at byte 14"},
		"a byte order mark":         {"\xef\xbb\xbf{}", ErrMalformed, prefix + ".dockerconfigjson is not valid JSON at byte 1"},
		"nested too deep":           {`{"x":` + strings.Repeat("[", 20_000), ErrMalformed, prefix + ".dockerconfigjson is not valid JSON at byte 10005"},
		"a string":                  {`"` + canary + `"`, ErrMalformed, prefix + ".dockerconfigjson must be a JSON object"},
		"a list":                    {`[{"auths":{}}]`, ErrMalformed, prefix + ".dockerconfigjson must be a JSON object"},
		"auths is a list":           {`{"auths":[]}`, ErrMalformed, prefix + ".dockerconfigjson: auths must be an object"},
		"auths is a number":         {`{"auths":1234567}`, ErrMalformed, prefix + ".dockerconfigjson: auths must be an object"},
		"an entry is a string":      {`{"auths":{"r.io":"` + canary + `"}}`, ErrMalformed, prefix + `auths["r.io"] must be a JSON object`},
		"a password is a number":    {`{"auths":{"r.io":{"password":1234567}}}`, ErrMalformed, prefix + `auths["r.io"]: password must be a string`},
		"a field name's case":       {`{"auths":{"r.io":{"PASSWORD":1234567}}}`, ErrMalformed, prefix + `auths["r.io"]: password must be a string`},
		"a token is an object":      {`{"auths":{"r.io":{"identitytoken":{"` + canary + `":1}}}}`, ErrMalformed, prefix + `auths["r.io"]: identitytoken must be a string`},
		"auth is not base64":        {`{"auths":{"r.io":{"auth":"` + canary + `"}}}`, ErrMalformed, prefix + `auths["r.io"]: auth is not base64`},
		"auth has a space after it": {`{"auths":{"r.io":{"auth":"Zm9vOmJhcg== "}}}`, ErrMalformed, prefix + `auths["r.io"]: auth is not base64`},
		"auth is URL base64":        {`{"auths":{"r.io":{"auth":"` + base64.URLEncoding.EncodeToString([]byte("foo:\xff\xff\xff")) + `"}}}`, ErrMalformed, prefix + `auths["r.io"]: auth is not base64`},
		"auth has no colon":         {`{"auths":{"r.io":{"auth":"` + b64(canary) + `"}}}`, ErrMalformed, prefix + `auths["r.io"]: auth is not the base64 of username:password (it has no colon)`},
		"of two bad entries the first by name is told": {
			`{"auths":{"z.io":{"auth":"!"},"b.io":{"auth":"!"},"a.io":{"username":"u"}}}`, ErrMalformed, prefix + `auths["b.io"]: auth is not base64`,
		},
		"user information in a key": {
			`{"auths":{"https://u:` + canary + `@r.io/x?token=` + canary + `":{"auth":"!"}}}`, ErrMalformed, prefix + `auths["r.io/x"]: auth is not base64`,
		},
		"user information with a slash in a key": {
			`{"auths":{"u:` + canary + `/?#@` + canary + `@r.io":1}}`, ErrMalformed, prefix + `auths["r.io"] must be a JSON object`,
		},
		"control characters in a key are quoted": {
			`{"auths":{"r.io\n\u001b[0m":1}}`, ErrMalformed, prefix + `auths["r.io\n\x1b[0m"] must be a JSON object`,
		},
		"a bad entry beside a key that matches nothing": {
			`{"auths":{"a b":{"auth":"!"}}}`, ErrMalformed, prefix + `auths["a b"]: auth is not base64`,
		},
		"a key of 1025 bytes": {
			`{"auths":{"` + strings.Repeat("é", 512) + `k":{}}}`, ErrTooLarge,
			`docker config too large: the key auths["` + strings.Repeat("é", 64) + `..."] has 1025 bytes, the limit is 1024`,
		},
		"a key cut inside a character": {
			`{"auths":{"k` + strings.Repeat("é", 512) + `":{}}}`, ErrTooLarge,
			`docker config too large: the key auths["k` + strings.Repeat("é", 63) + `..."] has 1025 bytes, the limit is 1024`,
		},
		"too many bytes": {
			strings.Repeat(" ", MaxBytes-1) + `{}`, ErrTooLarge, "docker config too large: .dockerconfigjson has 1048577 bytes, the limit is 1048576",
		},
		"too many registries": {
			`{"auths":{` + entries(MaxEntries+1) + `}}`, ErrTooLarge, "docker config too large: .dockerconfigjson has 10001 registries, the limit is 10000",
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config, notes, err := parseJSON(test.content)
			require.ErrorIs(t, err, test.class)
			require.EqualError(t, err, test.message)
			require.Empty(t, config.Entries())
			require.Empty(t, notes)
		})
	}

	for content, message := range map[string]string{
		`[]`:                      ".dockercfg must be a JSON object",
		`{`:                       ".dockercfg is not valid JSON at byte 1",
		`{"r.io":{"auth":"!"}}`:   `.dockercfg["r.io"]: auth is not base64`,
		`{"r.io":{"username":1}}`: `.dockercfg["r.io"]: username must be a string`,
	} {
		_, _, err := parseCfg(content)
		require.ErrorIs(t, err, ErrMalformed)
		require.EqualError(t, err, prefix+message)
	}
}

// entries returns n entries of {"auths":{...}}.
func entries(n int) string {
	var b strings.Builder
	for i := range n {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `"r%d.example.com/team":{"auth":"%s"}`, i, b64(fmt.Sprintf("user%d:password%d", i, i)))
	}
	return b.String()
}

func TestParseTakesAsMuchAsTheLimits(t *testing.T) {
	t.Parallel()
	config, notes, err := parseJSON(`{"auths":{` + entries(MaxEntries) + `}}`)
	require.NoError(t, err)
	require.Empty(t, notes)
	require.Len(t, config.Entries(), MaxEntries)

	_, _, err = parseJSON(strings.Repeat(" ", MaxBytes-2) + `{}`)
	require.NoError(t, err)

	config, notes, err = parseJSON(`{"auths":{"` + strings.Repeat("k", MaxKeyBytes) + `":{"username":"u"}}}`)
	require.NoError(t, err)
	require.Empty(t, notes)
	require.Len(t, config.Entries(), 1)
}

func TestParseRefusesOtherSecrets(t *testing.T) {
	t.Parallel()
	content := []byte(`{"auths":{"r.io":{"auth":"` + canary + `"}}}`)
	for name, test := range map[string]struct {
		secretType string
		key        string
		message    string
	}{
		"another type": {
			"Opaque", KeyDockerConfigJSON,
			`not a docker config Secret: its type is "Opaque"; use kubernetes.io/dockerconfigjson or kubernetes.io/dockercfg`,
		},
		"no type": {
			"", KeyDockerConfigJSON,
			`not a docker config Secret: its type is ""; use kubernetes.io/dockerconfigjson or kubernetes.io/dockercfg`,
		},
		"the older key under the newer type": {TypeDockerConfigJSON, KeyDockercfg, `not a docker config Secret: it has no key .dockerconfigjson`},
		"the newer key under the older type": {TypeDockercfg, KeyDockerConfigJSON, `not a docker config Secret: it has no key .dockercfg`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config, notes, err := Parse(test.secretType, map[string][]byte{test.key: content})
			require.ErrorIs(t, err, ErrSecretType)
			require.EqualError(t, err, test.message)
			require.Empty(t, config.Entries())
			require.Empty(t, notes)
		})
	}
}

func TestNotesAreBounded(t *testing.T) {
	t.Parallel()
	var fields []string
	for i := range 100 {
		fields = append(fields, fmt.Sprintf(`"%03d%s":1`, i, strings.Repeat("x", 1000)))
	}
	_, notes, err := parseJSON(`{` + strings.Join(fields, ",") + `}`)
	require.NoError(t, err)
	require.Len(t, notes, 11)
	require.Equal(t, "and 90 more", notes[10])
	for _, note := range notes {
		require.Less(t, len(note), 250)
	}
}

// A canary stands at every place of the input in turn, with each thing that can be wrong around it.
func TestNoErrorAndNoNoteHoldsAValue(t *testing.T) {
	t.Parallel()
	values := []string{
		`"` + canary + `"`, `"` + b64(canary) + `"`, `"` + b64("u:"+canary) + `"`, `["` + canary + `"]`, `{"` + canary + `":1}`,
		canary, `"` + canary, `"` + canary + `\x"`, `"` + canary + "\n\"", `"` + canary + `"}`, `1e` + canary,
	}
	shapes := []string{
		`%s`, `{"auths":%s}`, `{"auths":{"r.io":%s}}`, `{"auths":{"r.io":{"auth":%s}}}`, `{"auths":{"r.io":{"username":%s}}}`,
		`{"auths":{"r.io":{"password":%s}}}`, `{"auths":{"r.io":{"identitytoken":%s}}}`, `{"auths":{"r.io":{"registrytoken":%s}}}`,
		`{"auths":{"r.io":{"email":%s}}}`, `{"auths":{"r.io":{"other":%s}}}`, `{"credsStore":%s}`, `{"auths":{"r.io":{"auth":"!","password":%s}}}`,
		`{"auths":{"r.io":{"auth":"Zm9vOmJhcg==","username":%[1]s,"password":%[1]s}}}`, `{"auths":{}}%s`, `{"auths":{"u:` + canary + `@r.io":%s}}`,
		`{"auths":{"https://u:` + canary + `@r.io?` + canary + `#` + canary + `":%s}}`, `{"u:` + canary + `@r.io":%s}`,
	}
	for _, shape := range shapes {
		for _, value := range values {
			content := fmt.Sprintf(shape, value)
			for _, parse := range []func(string) (Config, []string, error){parseJSON, parseCfg} {
				if (shape == `%s` || shape == `{"auths":%s}`) && strings.HasPrefix(value, `{`) {
					continue // here the canary is itself a name, and names are told
				}
				_, notes, err := parse(content)
				require.NotContains(t, fmt.Sprintf("%v %+v %#v %v", err, err, err, notes), canary, content)
				require.NotContains(t, fmt.Sprint(err, notes), b64(canary), content)
			}
		}
	}
}
