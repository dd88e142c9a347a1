package cluster

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestBuild(t *testing.T) {
	t.Run("programs in KUBEBUILDER_ASSETS are used as they are", func(t *testing.T) {
		folder := assets(t, "etcd", "kube-apiserver", "kube-controller-manager")
		got, err := Build(t.Context(), failingWriter{t})
		require.NoError(t, err)
		require.Equal(t, Binaries{
			Etcd:              filepath.Join(folder, "etcd"),
			APIServer:         filepath.Join(folder, "kube-apiserver"),
			ControllerManager: filepath.Join(folder, "kube-controller-manager"),
		}, got)
	})

	t.Run("KUBEBUILDER_ASSETS may lack a controller manager", func(t *testing.T) {
		assets(t, "etcd", "kube-apiserver")
		got, err := Build(t.Context(), failingWriter{t})
		require.NoError(t, err)
		require.Empty(t, got.ControllerManager)
	})

	t.Run("what KUBEBUILDER_ASSETS lacks is named", func(t *testing.T) {
		assets(t, "kube-controller-manager")
		_, err := Build(t.Context(), failingWriter{t})
		require.ErrorContains(t, err, "lacks etcd and kube-apiserver")
	})

	t.Run("two processes build once", func(t *testing.T) {
		b, m := tinyBuilder(t)
		folders := make([]string, 2)
		var group sync.WaitGroup
		for i := range folders {
			group.Go(func() {
				folder, err := b.provide(t.Context(), m)
				if err != nil {
					t.Errorf("provide: %v", err)
				}
				folders[i] = folder
			})
		}
		group.Wait()
		require.Equal(t, folders[0], folders[1])
		require.FileExists(t, filepath.Join(folders[0], "tiny"))
		require.Equal(t, 1, strings.Count(b.progress.(*lockedBuffer).String(), "built tiny in"))
		left, err := filepath.Glob(filepath.Join(b.cache, "*.tmp-*"))
		require.NoError(t, err)
		require.Empty(t, left)
	})

	t.Run("an unfinished build of a dead process is removed", func(t *testing.T) {
		b, m := tinyBuilder(t)
		folder, err := b.provide(t.Context(), m)
		require.NoError(t, err)
		require.NoError(t, os.Rename(folder, folder+".tmp-1"))
		_, err = b.provide(t.Context(), m)
		require.NoError(t, err)
		require.NoDirExists(t, folder+".tmp-1")
	})

	t.Run("a change to the module makes another folder", func(t *testing.T) {
		b, m := tinyBuilder(t)
		before, err := b.provide(t.Context(), m)
		require.NoError(t, err)
		sum := filepath.Join(b.modules, "tiny", "go.sum")
		require.NoError(t, os.WriteFile(sum, []byte("\n"), 0o600))
		after, err := b.provide(t.Context(), m)
		require.NoError(t, err)
		require.NotEqual(t, before, after)
	})

	t.Run("a build that fails says why and leaves nothing in the cache", func(t *testing.T) {
		b, m := tinyBuilder(t)
		source := filepath.Join(b.modules, "tiny", "main.go")
		require.NoError(t, os.WriteFile(source, []byte("package main\n\nfunc main() { undefined() }\n"), 0o600))
		_, err := b.provide(t.Context(), m)
		require.ErrorContains(t, err, "undefined: undefined")
		folders, err := filepath.Glob(filepath.Join(b.cache, "tiny-*"))
		require.NoError(t, err)
		require.Len(t, folders, 1)
		require.Equal(t, ".lock", filepath.Ext(folders[0]))
	})
}

func TestBuildCounter(t *testing.T) {
	t.Parallel()
	c := newBuildCounter([]string{"a/b", "a/c", "a/d"})
	for _, text := range []string{"a/", "b\na/c\n# a/d\nd.go:1: wr", "ong\nand on"} {
		n, err := c.Write([]byte(text))
		require.NoError(t, err)
		require.Equal(t, len(text), n)
	}
	compiled, total := c.progress()
	require.Equal(t, 2, compiled)
	require.Equal(t, 3, total)
	require.Equal(t, "# a/d\nd.go:1: wrong\nand on", c.messages())
}

func TestPinnedVersion(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "go.mod")
	write := func(text string) { require.NoError(t, os.WriteFile(file, []byte(text), 0o600)) }

	write("module x\n\nrequire a.b/c v1.2.3\n")
	version, err := pinnedVersion(file, "a.b/c")
	require.NoError(t, err)
	require.Equal(t, "v1.2.3", version)

	write("module x\n\nrequire (\n\ta.b/c/d v1.0.0\n\ta.b/c v1.2.4 // indirect\n)\n")
	version, err = pinnedVersion(file, "a.b/c")
	require.NoError(t, err)
	require.Equal(t, "v1.2.4", version)

	_, err = pinnedVersion(file, "a.b")
	require.ErrorContains(t, err, "does not require a.b")
}

// assets points KUBEBUILDER_ASSETS to a new folder with empty files.
func assets(t *testing.T, names ...string) string {
	t.Helper()
	folder := t.TempDir()
	for _, name := range names {
		require.NoError(t, os.WriteFile(filepath.Join(folder, name), nil, 0o600))
	}
	t.Setenv("KUBEBUILDER_ASSETS", folder)
	return folder
}

// tinyBuilder builds a module that takes a moment to build.
func tinyBuilder(t *testing.T) (*builder, module) {
	t.Helper()
	modules := t.TempDir()
	files := map[string]string{
		"go.mod":  "module tiny\n\ngo 1.26.0\n\nrequire pinned.example v0.0.1\n\nreplace pinned.example => ./pinned\n",
		"go.sum":  "",
		"main.go": "package main\n\nfunc main() {}\n",

		"pinned/go.mod": "module pinned.example\n",
	}
	require.NoError(t, os.MkdirAll(filepath.Join(modules, "tiny", "pinned"), 0o750))
	for name, text := range files {
		require.NoError(t, os.WriteFile(filepath.Join(modules, "tiny", name), []byte(text), 0o600))
	}
	b := &builder{modules: modules, cache: filepath.Join(t.TempDir(), "cache"), progress: &lockedBuffer{}}
	return b, module{
		folder: "tiny", pinned: "pinned.example", packages: []string{"tiny"}, output: "tiny",
		version: func(string) []string { return nil },
	}
}

// lockedBuffer collects what several goroutines write.
type lockedBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *lockedBuffer) Write(text []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(text)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// failingWriter fails the test when something is written.
type failingWriter struct{ t *testing.T }

func (w failingWriter) Write(text []byte) (int, error) {
	w.t.Errorf("unexpected output: %s", text)
	return len(text), nil
}
