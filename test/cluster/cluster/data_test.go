package cluster

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestSweep(t *testing.T) {
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	alive, err := newDataDir(false)
	require.NoError(t, err)
	kept, err := newDataDir(true)
	require.NoError(t, err)
	require.NoError(t, kept.close())
	dead, err := newDataDir(false)
	require.NoError(t, err)
	require.NoError(t, dead.lock.Close())
	beginning := filepath.Join(temp, dataPrefix+"beginning")
	require.NoError(t, os.Mkdir(beginning, 0o700))
	unlocked := filepath.Join(temp, dataPrefix+"unlocked")
	require.NoError(t, os.Mkdir(unlocked, 0o700))
	old := time.Now().Add(-time.Hour)
	require.NoError(t, os.Chtimes(unlocked, old, old))
	other := filepath.Join(temp, "other")
	require.NoError(t, os.Mkdir(other, 0o700))

	sweep(temp)
	require.DirExists(t, alive.root)
	require.DirExists(t, kept.root)
	require.NoDirExists(t, dead.root)
	require.DirExists(t, beginning)
	require.NoDirExists(t, unlocked)
	require.DirExists(t, other)

	require.NoError(t, alive.close())
	require.NoDirExists(t, alive.root)
}

func TestFreePort(t *testing.T) {
	t.Parallel()
	port, err := freePort(t.Context())
	require.NoError(t, err)
	require.GreaterOrEqual(t, port, 10_000)
	require.Less(t, port, 65_536)
}

func TestPrefix(t *testing.T) {
	t.Parallel()
	label := regexp.MustCompile(`^[a-z]([a-z0-9-]*[a-z0-9])?$`)
	for _, name := range []string{"short", "Ünïcode and, signs/slashes", "a very long sentence that nobody reads to its end", "7 is first", "%"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first, second := Prefix(t), Prefix(t)
			require.Regexp(t, label, first)
			require.LessOrEqual(t, len(first), 32)
			require.NotEqual(t, first, second)
		})
	}
}
