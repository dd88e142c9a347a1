package dockerconfig

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"text/template"

	"github.com/stretchr/testify/require"
)

const canary = "CANARY-s3cr3t"

// holders are the ways in which other code comes to hold a Sensitive.
type (
	exportedHolder   struct{ Token Sensitive }
	unexportedHolder struct {
		name  string
		token Sensitive
		ptr   *Sensitive
		list  []Sensitive
		byKey map[string]Sensitive
		inner struct{ deep exportedHolder }
		any   any
	}
)

func TestASensitivePrintsNothingOfItsValue(t *testing.T) {
	t.Parallel()
	s := NewSensitive(canary)
	holder := unexportedHolder{
		name: "x", token: s, ptr: &s, list: []Sensitive{s}, byKey: map[string]Sensitive{"k": s},
		inner: struct{ deep exportedHolder }{exportedHolder{s}}, any: s,
	}
	entry := Entry{Key: s, Username: s, Password: s, normal: s}
	values := map[string]any{
		"the value":                     s,
		"a pointer to it":               &s,
		"a slice":                       []Sensitive{s},
		"a map":                         map[string]Sensitive{"k": s},
		"an array":                      [1]Sensitive{s},
		"an interface in a slice":       []any{s, &s},
		"a struct with exported fields": exportedHolder{s},
		"a pointer to such a struct":    &exportedHolder{s},
		"a struct with all kinds of unexported fields": holder,
		"a pointer to that struct":                     &holder,
		"a slice of such structs":                      []unexportedHolder{holder},
		"a map of such pointers":                       map[string]*unexportedHolder{"k": &holder},
		"an entry":                                     entry,
		"a config":                                     Config{entries: []Entry{entry}},
		"a pointer to a config":                        &Config{entries: []Entry{entry}},
		"a struct with an unexported config":           struct{ c Config }{Config{entries: []Entry{entry}}},
	}
	hex := fmt.Sprintf("%x", canary)
	for name, value := range values {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var printed bytes.Buffer
			for _, verb := range []string{"v", "+v", "#v", "s", "q", "+q", "#q", "x", "X", "# x", "d", "c", "U", "t", "e", "b", "o", "p", "T", "w", "10.3s", "-30v", "z"} {
				_, err := fmt.Fprintf(&printed, "%"+verb+"\n", value)
				require.NoError(t, err)
			}
			_, err := fmt.Fprintln(&printed, value)
			require.NoError(t, err)
			printed.WriteString(fmt.Errorf("wrapped: %v", value).Error())
			encoded, err := json.Marshal(value)
			require.NoError(t, err)
			printed.Write(encoded)
			slog.New(slog.NewTextHandler(&printed, nil)).Info("m", "value", value, "pointer", &value)
			slog.New(slog.NewJSONHandler(&printed, nil)).Info("m", "value", value, slog.Group("g", "any", value))
			require.NoError(t, template.Must(template.New("t").Parse("{{.}}")).Execute(&printed, value))

			require.NotContains(t, printed.String(), canary)
			require.NotContains(t, printed.String(), hex)
			require.NotContains(t, printed.String(), "67 65 65") // decimal "CAN"
		})
	}
}

func TestASensitivePrintsREDACTED(t *testing.T) {
	t.Parallel()
	for name, s := range map[string]Sensitive{"with a value": NewSensitive(canary), "empty": {}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d", "%9s"} {
				require.Equal(t, "REDACTED", fmt.Sprintf(verb, s), verb)
				require.Equal(t, "REDACTED", fmt.Sprintf(verb, &s), verb)
			}
			require.Equal(t, "{REDACTED}", fmt.Sprintf("%v", exportedHolder{s}))
			require.Equal(t, "REDACTED", s.String())
			text, err := s.MarshalText()
			require.NoError(t, err)
			require.Equal(t, "REDACTED", string(text))
			encoded, err := json.Marshal(map[string]any{"in a struct": exportedHolder{s}, "itself": s})
			require.NoError(t, err)
			require.JSONEq(t, `{"in a struct": {"Token": "REDACTED"}, "itself": "REDACTED"}`, string(encoded))
			require.Equal(t, "REDACTED", s.LogValue().String())
		})
	}
}

func TestASensitiveIsNotDecoded(t *testing.T) {
	t.Parallel()
	var holder exportedHolder
	err := json.Unmarshal([]byte(`{"Token":"`+canary+`"}`), &holder)
	require.Error(t, err)
	require.NotContains(t, err.Error(), canary)
	require.True(t, holder.Token.IsZero())
}

func TestASensitiveGivesItsValueToRevealOnly(t *testing.T) {
	t.Parallel()
	require.Equal(t, canary, NewSensitive(canary).Reveal())
	require.Equal(t, len(canary), NewSensitive(canary).Len())
	require.False(t, NewSensitive(canary).IsZero())

	b := []byte(canary)
	s := NewSensitive(b)
	clear(b)
	require.Equal(t, canary, s.Reveal(), "bytes are copied")

	type named string
	require.Equal(t, canary, NewSensitive(named(canary)).Reveal())
	require.Equal(t, "\xff\x00", NewSensitive("\xff\x00").Reveal(), "any bytes are kept")
}

func TestTheZeroSensitiveIsEmpty(t *testing.T) {
	t.Parallel()
	for _, s := range []Sensitive{{}, NewSensitive(""), NewSensitive([]byte(nil)), NewSensitive([]byte{})} {
		require.True(t, s.IsZero())
		require.Zero(t, s.Len())
		require.Empty(t, s.Reveal())
		require.True(t, s.Equal(Sensitive{}))
	}
	encoded, err := json.Marshal(struct {
		Token Sensitive `json:",omitzero"`
	}{})
	require.NoError(t, err)
	require.Equal(t, "{}", string(encoded))
}

func TestSensitivesAreEqualByValue(t *testing.T) {
	t.Parallel()
	require.True(t, NewSensitive("a").Equal(NewSensitive([]byte("a"))))
	require.False(t, NewSensitive("a").Equal(NewSensitive("b")))
	require.False(t, NewSensitive("a").Equal(Sensitive{}))
	require.False(t, Sensitive{}.Equal(NewSensitive("a")))
}

func TestAPanicWithASensitivePrintsNothingOfIt(t *testing.T) {
	t.Parallel()
	defer func() {
		require.NotContains(t, fmt.Sprint(recover()), canary)
	}()
	panic(errors.Join(fmt.Errorf("a: %v", NewSensitive(canary)), fmt.Errorf("b: %+v", unexportedHolder{token: NewSensitive(canary)})))
}
