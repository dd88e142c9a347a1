package dockerconfig

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestRenderWritesOneCanonicalForm(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		auths string
		want  string
	}{
		"nothing": {``, `{"auths":{}}`},
		"auth alone becomes all three": {
			`"r.io":{"auth":"Zm9vOmJhcg"}`, `{"auths":{"r.io":{"username":"foo","password":"bar","auth":"Zm9vOmJhcg=="}}}`,
		},
		"the pair alone becomes all three": {
			`"r.io":{"password":"bar","username":"foo"}`, `{"auths":{"r.io":{"username":"foo","password":"bar","auth":"Zm9vOmJhcg=="}}}`,
		},
		"an empty password has its key": {
			`"r.io":{"username":"foo"}`, `{"auths":{"r.io":{"username":"foo","password":"","auth":"Zm9vOg=="}}}`,
		},
		"an empty username has its key": {
			`"r.io":{"password":"bar"}`, `{"auths":{"r.io":{"username":"","password":"bar","auth":"OmJhcg=="}}}`,
		},
		"auth that contradicts the pair wins": {
			`"r.io":{"auth":"Zm9vOmJhcg==","username":"x","password":"y"}`, `{"auths":{"r.io":{"username":"foo","password":"bar","auth":"Zm9vOmJhcg=="}}}`,
		},
		"tokens and email follow": {
			`"r.io":{"email":"e","registrytoken":"r","identitytoken":"i","username":"foo","password":"bar"}`,
			`{"auths":{"r.io":{"username":"foo","password":"bar","auth":"Zm9vOmJhcg==","identitytoken":"i","registrytoken":"r","email":"e"}}}`,
		},
		"a token alone has no auth": {`"r.io":{"identitytoken":"i"}`, `{"auths":{"r.io":{"identitytoken":"i"}}}`},
		"keys are sorted as written": {
			`"b.io":{"identitytoken":"i"},"https://a.io/v1/":{"identitytoken":"i"},"*.a.io":{"identitytoken":"i"}`,
			`{"auths":{"*.a.io":{"identitytoken":"i"},"b.io":{"identitytoken":"i"},"https://a.io/v1/":{"identitytoken":"i"}}}`,
		},
		"no character is written for HTML": {
			`"r.io/<&>":{"password":"<&>\u2028\u0000\"\\é😀"}`,
			`{"auths":{"r.io/<&>":{"username":"","password":"<&>\u2028\u0000\"\\é😀","auth":"` + b64(":<&>\u2028\x00\"\\é😀") + `"}}}`,
		},
		"a username with a colon has no auth, which would split it elsewhere": {
			`"r.io":{"username":"a:b","password":"c"}`, `{"auths":{"r.io":{"username":"a:b","password":"c"}}}`,
		},
		"bytes that are not UTF-8 stand in auth only": {
			`"r.io":{"auth":"` + b64("foo:\xff") + `"},"s.io":{"auth":"` + b64("\xfe:bar") + `","identitytoken":"i"}`,
			`{"auths":{"r.io":{"auth":"` + b64("foo:\xff") + `"},"s.io":{"auth":"` + b64("\xfe:bar") + `","identitytoken":"i"}}}`,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config := mustParse(t, test.auths)
			rendered, err := config.Render()
			require.NoError(t, err)
			require.Equal(t, test.want, rendered.Reveal())

			again, _, err := parseJSON(rendered.Reveal())
			require.NoError(t, err)
			require.Equal(t, plain(config.Entries()), plain(again.Entries()), "what is rendered reads back unchanged")
		})
	}
}

func TestRenderOfTheZeroConfigIsEmpty(t *testing.T) {
	t.Parallel()
	rendered, err := Config{}.Render()
	require.NoError(t, err)
	require.Equal(t, `{"auths":{}}`, rendered.Reveal())
}

func TestRenderGivesNoMoreThanASecretHolds(t *testing.T) {
	t.Parallel()
	// Beside a password of n bytes there are its base64, 4*ceil((n+1)/3) bytes, and 58 more. One more does not fit.
	const n = 449363
	config, err := New(want{key: "r.io", password: strings.Repeat("p", n)}.entry())
	require.NoError(t, err)
	rendered, err := config.Render()
	require.NoError(t, err)
	require.Equal(t, MaxBytes-3, rendered.Len())

	config, err = New(want{key: "r.io", password: strings.Repeat("p", n+1)}.entry())
	require.NoError(t, err)
	rendered, err = config.Render()
	require.ErrorIs(t, err, ErrTooLarge)
	require.EqualError(t, err, "docker config too large: 1 registries render to 1048578 bytes, a Secret holds 1048576")
	require.True(t, rendered.IsZero())
}
