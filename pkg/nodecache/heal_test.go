package nodecache

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Whatever was done to what a writer has written, the next Set puts it right.
func TestWhatWasDamagedIsWrittenAgain(t *testing.T) {
	t.Parallel()
	inNode := func(name string) func(*Writer) string {
		return func(w *Writer) string { return filepath.Join(w.dir, "node", name) }
	}
	index, record, folder := inNode("index"), inNode(string(literal("r.one"))), inNode("")
	remove := func(t *testing.T, path string) { t.Helper(); require.NoError(t, os.RemoveAll(path)) }
	tests := map[string]struct {
		what  func(*Writer) string
		spoil func(t *testing.T, path string)
	}{
		"a record is gone":           {record, remove},
		"the index is gone":          {index, remove},
		"the scope's folder is gone": {folder, remove},
		"a record is cut off":        {record, func(t *testing.T, path string) { t.Helper(); require.NoError(t, os.Truncate(path, 150)) }},
		"a record is changed in place": {record, func(t *testing.T, path string) {
			t.Helper()
			change(t, path, `"u"`, `"v"`)
		}},
		"a record is open to others": {record, func(t *testing.T, path string) { t.Helper(); require.NoError(t, os.Chmod(path, 0o644)) }},
		"the scope's folder is open to others": {folder, func(t *testing.T, path string) {
			t.Helper()
			require.NoError(t, os.Chmod(path, 0o755))
		}},
		"a record is a link": {record, func(t *testing.T, path string) {
			t.Helper()
			remove(t, path)
			require.NoError(t, os.Symlink("index", path))
		}},
		"a record is a FIFO": {record, func(t *testing.T, path string) {
			t.Helper()
			remove(t, path)
			require.NoError(t, syscall.Mkfifo(path, 0o600))
		}},
		"a record is a folder with something in it": {record, func(t *testing.T, path string) {
			t.Helper()
			remove(t, path)
			require.NoError(t, os.MkdirAll(filepath.Join(path, "x"), 0o700))
		}},
		"the scope's folder is a link": {folder, func(t *testing.T, path string) {
			t.Helper()
			remove(t, path)
			require.NoError(t, os.Symlink(".", filepath.Clean(path)))
		}},
		"the scope's folder is a file": {folder, func(t *testing.T, path string) {
			t.Helper()
			remove(t, path)
			require.NoError(t, os.WriteFile(filepath.Clean(path), nil, 0o600))
		}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, r := open(t)
			all := entries("r.one=1", "r.two=2")
			set(t, w, Node, all)
			test.spoil(t, test.what(w))
			set(t, w, Node, all)
			require.Equal(t, []string{"r.one=1"}, lookup(t, r, Node, "r.one/app"))
			require.Equal(t, []string{"r.two=2"}, lookup(t, r, Node, "r.two/app"))
		})
	}
}

// A writer whose folder, or lock, is not in its place any more says so, and another one takes over.
func TestALostFolder(t *testing.T) {
	t.Parallel()
	tests := map[string]func(t *testing.T, dir string){
		"the folder is gone": func(t *testing.T, dir string) { t.Helper(); require.NoError(t, os.RemoveAll(dir)) },
		"what is in it is gone": func(t *testing.T, dir string) {
			t.Helper()
			for _, name := range []string{lockName, "node"} {
				require.NoError(t, os.RemoveAll(filepath.Join(dir, name)))
			}
		},
		"another has taken its place": func(t *testing.T, dir string) {
			t.Helper()
			require.NoError(t, os.Rename(dir, dir+"x"))
			require.NoError(t, os.Mkdir(dir, 0o700))
		},
		"its lock is another file": func(t *testing.T, dir string) {
			t.Helper()
			require.NoError(t, os.Remove(filepath.Join(dir, lockName)))
			require.NoError(t, os.WriteFile(filepath.Join(dir, lockName), nil, 0o600))
		},
		"it is open to others": func(t *testing.T, dir string) {
			t.Helper()
			require.NoError(t, os.Chmod(dir, 0o755))
		},
	}
	for name, spoil := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, r := open(t)
			set(t, w, Node, entries("r.one=1"))
			spoil(t, w.dir)
			_, err := w.Set(Node, entries("r.one=1"))
			require.ErrorIs(t, err, ErrLost)
			require.ErrorIs(t, w.Remove(Node), ErrLost)
			_, err = w.Scopes()
			require.ErrorIs(t, err, ErrLost)
			require.NoError(t, w.Close())
			w, err = Open(w.dir)
			require.NoError(t, err)
			defer func() { require.NoError(t, w.Close()) }()
			set(t, w, Node, entries("r.one=1"))
			require.Equal(t, []string{"r.one=1"}, lookup(t, r, Node, "r.one/app"))
			require.True(t, Alive(w.dir))
		})
	}
}

func TestFoldersThatAreThereBefore(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "imps")
	require.NoError(t, os.Mkdir(dir, 0o755)) // as kubelets make the folder of a hostPath
	w, err := Open(dir)
	require.NoError(t, err)
	set(t, w, Node, entries("r.one=1"))
	require.Equal(t, []string{"r.one=1"}, lookup(t, NewReader(dir), Node, "r.one/app"))
	require.NoError(t, w.Close())

	link := dir + "-link"
	require.NoError(t, os.Symlink(dir, link))
	_, err = Open(link)
	require.ErrorContains(t, err, link+": it must be a folder, and no symbolic link")
	file := dir + "-file"
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	_, err = Open(file)
	require.ErrorContains(t, err, file)
	if os.Geteuid() == 0 {
		require.NoError(t, os.Chown(dir, 1, 1))
		_, err = Open(dir)
		require.ErrorContains(t, err, "it belongs to user 1, and must to user 0")
	}
}

// What no record can hold is left out, and holds nothing else up.
func TestEntriesThatNoRecordCanHold(t *testing.T) {
	t.Parallel()
	w, r := open(t)
	set(t, w, Node, entries("r.one=old", "r.two=old"))
	large := Entry{Key: "r.one", Username: password("u"), Password: password(strings.Repeat("x", MaxRecordBytes))}
	bad := []string{"", "/app", strings.Repeat("a", maxKeyBytes+1), "https://r.four", "r.four?x", "r.four/x#y", "me@r.four", "r.four/%2f", "r four"}
	all := append(entries("r.two=new", "r.three=3"), large)
	for _, key := range bad {
		all = append(all, entries(key+"=x")...)
	}
	skipped, err := w.Set(Node, all)
	require.NoError(t, err)
	require.Equal(t, len(bad)+1, skipped)
	require.Equal(t, []string{"r.one=old"}, lookup(t, r, Node, "r.one/app"), "what was good stays")
	require.Equal(t, []string{"r.two=new"}, lookup(t, r, Node, "r.two/app"))
	require.Equal(t, []string{"r.three=3"}, lookup(t, r, Node, "r.three/app"))
	require.Empty(t, lookup(t, r, Node, "r.four/app"))

	skipped, err = w.Set(InNamespace("new"), []Entry{large})
	require.NoError(t, err)
	require.Equal(t, 1, skipped)
	require.Empty(t, lookup(t, r, InNamespace("new"), "r.one/app"), "its scope is known")
}

// mount mounts something for a test, which is skipped where that is not allowed, though not in CI.
func mount(t *testing.T, source, target, kind string, flags uintptr, data string) {
	t.Helper()
	if err := syscall.Mount(source, target, kind, flags, data); err != nil {
		require.Empty(t, os.Getenv("CI"), "needs root on Linux: %v", err)
		t.Skip("needs root on Linux:", err)
	}
	t.Cleanup(func() { require.NoError(t, syscall.Unmount(target, 0)) })
}

// A full file system, and one that cannot be written to, cost what is new, and nothing that was good before.
func TestFileSystems(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "imps")
	require.NoError(t, os.Mkdir(dir, 0o700))
	mount(t, "tmpfs", dir, "tmpfs", 0, "size=64k,mode=0700")
	w, err := Open(dir)
	require.NoError(t, err)
	r := NewReader(dir)
	set(t, w, Node, entries("r.one=old", "r.two=old"))
	large := append(entries("r.two=new"), Entry{Key: "r.one", Username: password("u"), Password: password(strings.Repeat("x", 100_000))})
	_, err = w.Set(Node, large)
	require.ErrorIs(t, err, syscall.ENOSPC)
	require.EqualError(t, err, "node cache "+dir+": write: no space left on device", "the same each time")
	require.Equal(t, []string{"r.one=old"}, lookup(t, r, Node, "r.one/app"))
	require.Len(t, lookup(t, r, Node, "r.two/app"), 1, "old or new")
	left, err := filepath.Glob(filepath.Join(dir, "*", temporary+"*"))
	require.NoError(t, err)
	require.Empty(t, left)
	for i := 0; err == nil; i++ { // until not even an index can be written
		err = os.WriteFile(filepath.Join(dir, fmt.Sprint("x", i)), []byte("x"), 0o600)
	}
	require.ErrorIs(t, err, syscall.ENOSPC)
	_, err = w.Set(Node, entries("r.one=old"))
	require.NoError(t, err, "there is room by what is dropped")
	require.Empty(t, lookup(t, r, Node, "r.two/app"), "what is taken back is")
	require.Equal(t, []string{"r.one=old"}, lookup(t, r, Node, "r.one/app"))
	next := append(entries("r.one=new"), Entry{Key: "r.three", Username: password("u"), Password: password(canary + strings.Repeat("x", 20_000))})
	_, err = w.Set(Node, next)
	require.ErrorIs(t, err, syscall.ENOSPC)
	require.NotContains(t, err.Error(), canary)
	files, err := filepath.Glob(filepath.Join(dir, "x*"))
	require.NoError(t, err)
	for _, file := range files {
		require.NoError(t, os.Remove(file))
	}
	set(t, w, Node, next)
	require.Len(t, lookup(t, r, Node, "r.three/app"), 1, "memory is not ahead of the disk")
	set(t, w, Node, entries("r.one=old"))

	require.NoError(t, w.Close())
	require.NoError(t, syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, "size=64k"))
	_, err = Open(dir)
	require.ErrorIs(t, err, syscall.EROFS)
	require.Equal(t, []string{"r.one=old"}, lookup(t, r, Node, "r.one/app"))

	require.NoError(t, syscall.Mount("", dir, "", syscall.MS_REMOUNT, "size=64k"))
	w, err = Open(dir)
	require.NoError(t, err)
	defer func() { require.NoError(t, w.Close()) }()
	set(t, w, Node, entries("r.one=new"))
	require.Equal(t, []string{"r.one=new"}, lookup(t, r, Node, "r.one/app"))
}

// As a container has it, whose hostPath is removed on the node.
func TestAFolderThatIsRemovedUnderItsMount(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	source, mounted := filepath.Join(dir, "source"), filepath.Join(dir, "mounted")
	require.NoError(t, os.Mkdir(source, 0o700))
	require.NoError(t, os.Mkdir(mounted, 0o700))
	mount(t, source, mounted, "", syscall.MS_BIND, "")
	w, err := Open(mounted)
	require.NoError(t, err)
	set(t, w, Node, entries("r.one=1"))
	require.NoError(t, os.RemoveAll(source))
	_, err = w.Set(Node, entries("r.one=1"))
	require.ErrorIs(t, err, ErrLost)
	require.NoError(t, w.Close())
	_, err = Open(mounted)
	require.ErrorIs(t, err, ErrRemoved)
}

// A key that moves from a record to another is found all the time.
func TestAKeyThatMoves(t *testing.T) {
	t.Parallel()
	w, r := open(t)
	set(t, w, Node, entries("r.one=1"))
	var stop atomic.Bool
	done := make(chan error, 1)
	go func() {
		var err error
		for i := 0; !stop.Load() && err == nil; i++ {
			_, err = w.Set(Node, entries([]string{"*.one=1", "r.one=1", "r.*=1"}[i%3]))
		}
		done <- err
	}()
	for range 10_000 {
		found, err := r.Lookup(Node, "r.one/app", 0)
		require.NoError(t, err)
		require.True(t, found.Matches)
	}
	stop.Store(true)
	require.NoError(t, <-done)
}

// Whatever other keys with globs there are, a reader looks at those alone whose globs are in the same places.
func TestKeysWithGlobsAreReadByTheirShape(t *testing.T) {
	t.Parallel()
	w, r := open(t)
	all := entries("*.r.example=1", "a*.r.example/team=2", "*.*.example=3")
	for i := range 100 {
		all = append(all, entries(fmt.Sprintf("*.r%d.example=x", i))...)
	}
	set(t, w, Node, all)
	for i := range 100 {
		require.NoError(t, os.Truncate(filepath.Join(w.dir, "node", string(shape(fmt.Sprintf("a.r%d.example", i), "*--"))), 1))
	}
	require.Equal(t, []string{"*.*.example=3", "*.r.example=1", "a*.r.example/team=2"}, lookup(t, r, Node, "ab.r.example/app"))
	found, err := r.Lookup(Node, "ab.r.example/app", 0)
	require.NoError(t, err)
	require.False(t, found.Withheld, "no other was looked at")
	found, err = r.Lookup(Node, "ab.r7.example/app", 0)
	require.NoError(t, err)
	require.True(t, found.Withheld)
}

// A record that is damaged hides no other one.
func TestADamagedRecordBesideAGoodOne(t *testing.T) {
	t.Parallel()
	w, r := open(t)
	set(t, w, Node, entries("r.one=1", "*.one=2"))
	require.NoError(t, os.Truncate(filepath.Join(w.dir, "node", string(shape("r.one", "*-"))), 1))
	found, err := r.Lookup(Node, "r.one/app", 0)
	require.NoError(t, err)
	require.True(t, found.Matches)
	require.True(t, found.Withheld, "there may be more")
	_, err = r.Lookup(Node, "s.one/app", 0)
	require.ErrorIs(t, err, errFormat)
}

// What several scopes hold is on disk once, whatever happens to each of them.
func TestTheSameRecordsAreOneFile(t *testing.T) {
	t.Parallel()
	w, r := open(t)
	scopes := []Scope{Node, InNamespace("a"), InNamespace("b"), InNamespace("c")}
	all := entries("r.one=1", "r.two=2")
	inodes := func(host string) map[uint64]bool {
		different := map[uint64]bool{}
		for _, scope := range scopes {
			folder, err := scope.folder()
			require.NoError(t, err)
			there, err := w.stampOf(filepath.Join(folder, string(literal(host))))
			require.NoError(t, err)
			different[there.inode] = true
		}
		return different
	}
	everywhere := func(want ...string) {
		t.Helper()
		for _, scope := range scopes {
			set(t, w, scope, all)
			require.True(t, w.Holds(scope))
		}
		for _, scope := range scopes {
			for _, image := range []string{"r.one/app", "r.two/app"} {
				require.Subset(t, want, lookup(t, r, scope, image), "%v", scope)
			}
		}
	}
	everywhere("r.one=1", "r.two=2")
	require.Len(t, inodes("r.one"), 1)
	require.Len(t, w.shared, 2+len(scopes), "and an index each")

	set(t, w, Node, entries("r.one=node", "r.two=2"))
	require.Len(t, inodes("r.one"), 2)
	require.Equal(t, []string{"r.one=1"}, lookup(t, r, InNamespace("a"), "r.one/app"))
	require.NoError(t, w.Remove(InNamespace("a")))
	require.Equal(t, []string{"r.one=1"}, lookup(t, r, InNamespace("b"), "r.one/app"))
	everywhere("r.one=1", "r.two=2")
	require.Len(t, inodes("r.one"), 1)

	all = entries("r.one=rotated", "r.two=2")
	everywhere("r.one=rotated", "r.two=2")
	require.Len(t, inodes("r.one"), 1)
	require.Len(t, w.shared, 2+len(scopes), "nothing of before is remembered")

	change(t, filepath.Join(w.dir, "ns-b", string(literal("r.one"))), "rotated", "damaged") // in place: of all
	require.False(t, w.Holds(InNamespace("c")))
	everywhere("r.one=rotated", "r.two=2")
	require.Len(t, inodes("r.one"), 1)

	for _, scope := range scopes {
		require.NoError(t, w.Remove(scope))
	}
	require.Empty(t, w.shared)
	require.Empty(t, w.known)
	require.False(t, w.Holds(Node))
}

// What is added takes nothing away.
func TestAdd(t *testing.T) {
	t.Parallel()
	w, r := open(t)
	set(t, w, Node, entries("r.one=1", "*.two=2"))
	again, err := func() (*Writer, error) { require.NoError(t, w.Close()); return Open(w.dir) }() // another one, who knows nothing of that
	require.NoError(t, err)
	defer func() { require.NoError(t, again.Close()) }()
	_, err = again.Add(Node, entries("r.three=3", "a.*=4"))
	require.NoError(t, err)
	for image, want := range map[string]string{"r.one/x": "r.one=1", "a.two/x": "*.two=2", "r.three/x": "r.three=3", "a.five/x": "a.*=4"} {
		require.Contains(t, lookup(t, r, Node, image), want)
	}
	_, err = again.Add(Node, entries("r.one=new"))
	require.NoError(t, err)
	require.Equal(t, []string{"r.one=new"}, lookup(t, r, Node, "r.one/x"))
	set(t, again, Node, entries("r.three=3"))
	require.Empty(t, lookup(t, r, Node, "r.one/x"))
	_, err = again.Add(InNamespace("new"), nil)
	require.NoError(t, err)
	require.Empty(t, lookup(t, r, InNamespace("new"), "r.one/x"), "it is known")
}

// What is for an image is told from what is for others of its registry.
func TestWhatMatches(t *testing.T) {
	t.Parallel()
	w, r := open(t)
	set(t, w, Node, append(entries("r.one/team=1", "index.docker.io=2", "index.docker.io/team=3"),
		Entry{Key: "r.two", Username: password("u"), Password: password("p"), Expires: time.Now().Add(30 * time.Second)}))
	for image, want := range map[string]Answer{
		"r.one/team/app":    {Matches: true},
		"r.one/teams":       {Matches: true}, // a plain prefix
		"r.one/app":         {},
		"docker.io/library": {Matches: true},
		"r.two/app":         {Withheld: true},
	} {
		got, err := r.Lookup(Node, image, time.Minute)
		require.NoError(t, err)
		require.Equal(t, want.Matches, got.Matches, image)
		require.Equal(t, want.Withheld, got.Withheld, image)
	}
}

// A record is dated anew when the clock has jumped, or turns out to be behind.
func TestClocksThatAreSet(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	token := []Entry{{Key: "r.one", Username: password("u"), Password: password("p"), Expires: noon.Add(12 * time.Hour)}}
	now := instant{noon, time.Hour, "boot"}
	later := func(by time.Duration) { now.Wall, now.Boot = now.Wall.Add(by), now.Boot+by }
	start := func(t *testing.T, wall time.Time) (*Writer, func() time.Duration) {
		t.Helper()
		now = instant{wall, time.Hour, "boot"}
		w, r := open(t)
		w.clock, r.clock = fake(&now), fake(&now)
		return w, func() time.Duration {
			found, err := r.Lookup(Node, "r.one/app", 0)
			require.NoError(t, err)
			if !found.Matches {
				return 0
			}
			left, _ := found.Credentials[0].Left()
			return left
		}
	}

	// It is written while the clock is a day ahead, and good as soon as that is set right.
	w, left := start(t, noon.Add(24*time.Hour))
	set(t, w, Node, token)
	require.Zero(t, left())
	now.Wall = noon
	require.Zero(t, left(), "it is not known which of the two is right")
	set(t, w, Node, token)
	require.Equal(t, 12*time.Hour, left())

	// It is written while the clock is a day behind, which a server tells.
	w, left = start(t, noon.Add(-24*time.Hour))
	set(t, w, Node, token)
	require.Greater(t, left(), 12*time.Hour, "nobody knows better")
	w.SetTime(noon)
	set(t, w, Node, token)
	require.Equal(t, 12*time.Hour, left())
	later(12 * time.Hour)
	set(t, w, Node, token)
	require.Zero(t, left(), "also when what told is long ago")

	// A server that is behind does not count, and none is followed for a few seconds.
	w, left = start(t, noon)
	w.SetTime(noon.Add(-24 * time.Hour))
	set(t, w, Node, token)
	require.Equal(t, 12*time.Hour, left())
	w.SetTime(noon.Add(clockTolerance))
	set(t, w, Node, token)
	require.Equal(t, 12*time.Hour, left())
}

// What an agent does at its start, at each rotation, and at each look: for so many namespaces with so many registries each, all with
// the same credentials, of the size of an ECR token.
func BenchmarkWriter(b *testing.B) {
	for _, size := range []struct{ namespaces, registries int }{{20, 20}, {100, 100}} {
		token := func(i int) (all []Entry) {
			for n := range size.registries {
				all = append(all, Entry{Key: fmt.Sprintf("r%d.example", n), Username: password("AWS"), Password: password(fmt.Sprintf("%2500d", i))})
			}
			return all
		}
		w, err := Open(filepath.Join(b.TempDir(), "imps")) // TMPDIR=/dev/shm for a tmpfs
		require.NoError(b, err)
		b.Run(fmt.Sprintf("write/%dx%d", size.namespaces, size.registries), func(b *testing.B) {
			for i := range b.N {
				for n := range size.namespaces {
					set(b, w, InNamespace(fmt.Sprint("n", n)), token(i))
				}
			}
		})
		b.Run(fmt.Sprintf("look/%dx%d", size.namespaces, size.registries), func(b *testing.B) {
			for range b.N {
				for n := range size.namespaces {
					require.True(b, w.Holds(InNamespace(fmt.Sprint("n", n))))
				}
			}
		})
		require.NoError(b, w.Close())
	}
}
