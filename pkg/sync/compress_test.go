package sync

import (
	"bytes"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestWhatIsCompressedIsExpanded(t *testing.T) {
	t.Parallel()
	for _, raw := range []string{"", "x", canary, strings.Repeat(canary, 10_000)} {
		compressed := Compress([]byte(raw))
		require.Equal(t, compressed, Compress([]byte(raw)))
		got, err := Expand(compressed, len(raw))
		require.NoError(t, err)
		require.Equal(t, raw, string(got))
		if raw != "" {
			_, err = Expand(compressed, len(raw)-1)
			require.Error(t, err, "no more than there may be")
			requireSilent(t, err.Error())
		}
	}
	require.Less(t, len(Compress([]byte(strings.Repeat(canary, 10_000)))), 5_000)
}

func TestWhatWasNotCompressedIsRefused(t *testing.T) {
	t.Parallel()
	good := Compress([]byte(canary))
	for name, compressed := range map[string][]byte{
		"nothing":             nil,
		"the text itself":     []byte(canary),
		"half of it":          good[:len(good)/2],
		"without its end":     good[:len(good)-1],
		"with more behind it": append(bytes.Clone(good), canary...),
		"with another bit":    append(bytes.Clone(good[:len(good)-8]), 0, 0, 0, 0, 0, 0, 0, 0),
	} {
		got, err := Expand(compressed, 1000)
		require.Error(t, err, name)
		require.Empty(t, got, name)
		requireSilent(t, err.Error())
	}
}
