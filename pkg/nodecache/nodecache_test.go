package nodecache

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// canary stands for a credential. No test may find it where things are printed.
const canary = "canary-8c31f7-never-printed"

// password is a credential, as the agent has it.
type password string

func (p password) Reveal() string { return string(p) }

// open returns a Writer of a new folder, and a Reader.
func open(t *testing.T) (*Writer, *Reader) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "imps")
	w, err := Open(dir)
	require.NoError(t, err)
	t.Cleanup(func() { _ = w.Close() })
	return w, NewReader(dir)
}

// entries has one for each key, "key=password".
func entries(keys ...string) (all []Entry) {
	for _, key := range keys {
		key, secret, _ := strings.Cut(key, "=")
		all = append(all, Entry{Key: key, Username: password("u"), Password: password(secret)})
	}
	return all
}

// set has a scope hold entries, all of them.
func set(t testing.TB, w *Writer, scope Scope, entries []Entry) {
	t.Helper()
	skipped, err := w.Set(scope, entries)
	require.NoError(t, err)
	require.Zero(t, skipped)
}

// lookup returns what a scope has for an image, "key=password", sorted.
func lookup(t *testing.T, r *Reader, scope Scope, image string) []string {
	t.Helper()
	found, err := r.Lookup(scope, image, 0)
	require.NoError(t, err)
	all := []string{}
	for _, c := range found.Credentials {
		username, secret := c.Reveal()
		require.Equal(t, "u", username)
		all = append(all, c.Key()+"="+secret)
	}
	slices.Sort(all)
	return all
}

func TestWhatAHostHasCredentialsFor(t *testing.T) {
	t.Parallel()
	w, r := open(t)
	set(t, w, Node, entries("r.one=1", "r.one/team=2", "r.one:5000=3", "*.two=4", "a.*.three/x=5", "*.two:5000=6", "[fd00::1]:5000=7", "index.docker.io=8",
		"localhost:5000=9", "*=10", "a*.four=11", "[ab].four/x=12"))
	for image, want := range map[string][]string{
		"r.one/app":               {"r.one/team=2", "r.one=1"},
		"r.one:5000/app":          {"r.one:5000=3"},
		"r.one:5001/app":          {},
		"R.one/app":               {},
		"b.two/app":               {"*.two=4"},
		"b.two:5000/app":          {"*.two:5000=6"},
		"b.b.two/app":             {},
		"a.b.three/y":             {"a.*.three/x=5"},
		"[fd00::1]:5000/app":      {"[fd00::1]:5000=7"},
		"docker.io/library/nginx": {"index.docker.io=8"},
		"localhost:5000/app":      {"localhost:5000=9"},
		"localhost/app":           {"*=10", "index.docker.io=8"},
		"ab.four/app":             {"a*.four=11"},
		"a.four/app":              {"[ab].four/x=12", "a*.four=11"},
		"other.registry/app":      {},
	} {
		require.Equal(t, want, lookup(t, r, Node, image), image)
	}
	for _, image := range []string{"", "nginx", "/app", "r.one/", strings.Repeat("a", maxKeyBytes) + "/app"} {
		_, err := r.Lookup(Node, image, 0)
		require.Error(t, err, image)
	}
}

// As net.SplitHostPort, which is not linked into the provider.
func TestHostsAreSplitAsTheStandardLibraryDoes(t *testing.T) {
	t.Parallel()
	pieces := []string{"a", ".", ":", "[", "]", "5000", "*", "::1", ""}
	for i := range 9 * 9 * 9 * 9 * 9 {
		var host strings.Builder
		for n := i; n > 0; n /= 9 {
			host.WriteString(pieces[n%9])
		}
		wantName, wantPort, err := net.SplitHostPort(host.String())
		if err != nil {
			wantName, wantPort = host.String(), ""
		}
		name, port := splitPort(host.String())
		require.Equal(t, []string{wantName, wantPort}, []string{name, port}, host.String())
	}
}

func TestScopesAreApart(t *testing.T) {
	t.Parallel()
	w, r := open(t)
	_, err := r.Lookup(InNamespace("a"), "r.one/app", 0)
	require.ErrorIs(t, err, ErrUnknown)
	set(t, w, Node, entries("r.one=node"))
	set(t, w, InNamespace("a"), entries("r.one=a"))
	set(t, w, InNamespace("b"), nil)
	require.Equal(t, []string{"r.one=node"}, lookup(t, r, Node, "r.one/app"))
	require.Equal(t, []string{"r.one=a"}, lookup(t, r, InNamespace("a"), "r.one/app"))
	require.Empty(t, lookup(t, r, InNamespace("b"), "r.one/app"), "nothing is an answer, too")
	_, err = r.Lookup(InNamespace("c"), "r.one/app", 0)
	require.ErrorIs(t, err, ErrUnknown)
	for _, namespace := range []string{"..", "a/b", "A", "a.b", strings.Repeat("a", 64)} {
		_, err = r.Lookup(InNamespace(namespace), "r.one/app", 0)
		require.Error(t, err)
		require.NotErrorIs(t, err, ErrUnknown)
		_, err = w.Set(InNamespace(namespace), nil)
		require.Error(t, err)
	}
	scopes, err := w.Scopes()
	require.NoError(t, err)
	require.ElementsMatch(t, []Scope{Node, InNamespace("a"), InNamespace("b")}, scopes)
	require.NoError(t, w.Remove(InNamespace("a")))
	require.NoError(t, w.Remove(InNamespace("a")), "and again")
	_, err = r.Lookup(InNamespace("a"), "r.one/app", 0)
	require.ErrorIs(t, err, ErrUnknown)
	set(t, w, InNamespace("a"), entries("r.one=again")) // it comes back
	require.Equal(t, []string{"r.one=again"}, lookup(t, r, InNamespace("a"), "r.one/app"))
}

func TestWhatIsAsItShouldBeIsNotWrittenAgain(t *testing.T) {
	t.Parallel()
	w, r := open(t)
	set(t, w, Node, entries("r.one=1", "r.two=2", "r.three=3"))
	inodes := func() map[string]uint64 {
		files, err := os.ReadDir(filepath.Join(w.dir, "node"))
		require.NoError(t, err)
		all := map[string]uint64{}
		for _, f := range files {
			info, err := f.Info()
			require.NoError(t, err)
			require.Equal(t, os.FileMode(0o600), info.Mode())
			all[f.Name()] = info.Sys().(*syscall.Stat_t).Ino
		}
		return all
	}
	before := inodes()
	require.Len(t, before, 4)
	set(t, w, Node, entries("r.three=3", "r.two=2", "r.one=1"))
	require.Equal(t, before, inodes())
	set(t, w, Node, entries("r.one=1", "r.two=changed"))
	after := inodes()
	require.Len(t, after, 3, "what is not to be there is not")
	require.Equal(t, before[string(literal("r.one"))], after[string(literal("r.one"))])
	require.NotEqual(t, before[string(literal("r.two"))], after[string(literal("r.two"))])
	require.Equal(t, []string{"r.two=changed"}, lookup(t, r, Node, "r.two/app"))
}

// fake is a clock that a test sets.
func fake(now *instant) clock { return func() (instant, error) { return *now, nil } }

func TestWhatExpires(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	tests := map[string]struct {
		now  instant
		want time.Duration // zero: nothing is found
	}{
		"an hour later":                                  {instant{noon.Add(time.Hour), 2 * time.Hour, "boot"}, 11 * time.Hour},
		"when it has expired":                            {instant{noon.Add(12 * time.Hour), 13 * time.Hour, "boot"}, 0},
		"within the margin":                              {instant{noon.Add(12*time.Hour - time.Minute), 13*time.Hour - time.Minute, "boot"}, 0},
		"the time of day was set back by a day":          {instant{noon.Add(-23 * time.Hour), 2 * time.Hour, "boot"}, 11 * time.Hour},
		"it was set back, and it has expired":            {instant{noon.Add(-11 * time.Hour), 14 * time.Hour, "boot"}, 0},
		"it was set forward by an hour":                  {instant{noon.Add(2 * time.Hour), 2 * time.Hour, "boot"}, 10 * time.Hour},
		"it was set forward by a day":                    {instant{noon.Add(25 * time.Hour), 2 * time.Hour, "boot"}, 0},
		"the machine was suspended for a day":            {instant{noon.Add(time.Hour), 26 * time.Hour, "boot"}, 0},
		"another start of the machine, an hour later":    {instant{noon.Add(time.Hour), time.Minute, "another"}, 11 * time.Hour},
		"another start of the machine, when it is over":  {instant{noon.Add(13 * time.Hour), time.Minute, "another"}, 0},
		"the clock since the start runs ahead, a little": {instant{noon.Add(time.Hour), 2*time.Hour + time.Second, "boot"}, 11*time.Hour - time.Second},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			w, r := open(t)
			w.clock = fake(&instant{noon, time.Hour, "boot"})
			r.clock = fake(&test.now)
			set(t, w, Node, append(entries("r.one/ever=1"), Entry{Key: "r.one", Username: password("u"), Password: password("2"), Expires: noon.Add(12 * time.Hour)}))
			found, err := r.Lookup(Node, "r.one/app", time.Minute)
			require.NoError(t, err)
			var got time.Duration
			for _, c := range found.Credentials {
				if left, expires := c.Left(); expires {
					got = left
				}
			}
			require.Equal(t, test.want, got)
			require.Equal(t, test.want == 0, found.Withheld)
			require.Len(t, found.Credentials, 1+min(1, int(test.want)), "what does not expire is there, always")
		})
	}
}

func TestTheClockOfTheMachine(t *testing.T) {
	t.Parallel()
	a, err := systemClock()
	require.NoError(t, err)
	require.WithinDuration(t, time.Now(), a.Wall, time.Minute)
	require.Positive(t, a.Boot)
	require.Len(t, a.BootID, 36)
}

// A reader takes nothing that is not exactly as a writer leaves it.
func TestDoubtfulFiles(t *testing.T) {
	t.Parallel()
	const image = "r.one/app"
	name := string(literal("r.one"))
	record := func(w *Writer) string { return filepath.Join(w.dir, "node", name) }
	write := func(t *testing.T, path string, content []byte) {
		t.Helper()
		require.NoError(t, os.WriteFile(path, content, 0o600))
	}
	tests := map[string]func(t *testing.T, w *Writer){
		"the folder is open to others": func(t *testing.T, w *Writer) { require.NoError(t, os.Chmod(w.dir, 0o755)) },
		"the scope's folder is, too":   func(t *testing.T, w *Writer) { require.NoError(t, os.Chmod(filepath.Join(w.dir, "node"), 0o750)) },
		"the record is open to others": func(t *testing.T, w *Writer) { require.NoError(t, os.Chmod(record(w), 0o644)) },
		"the record is a link to another": func(t *testing.T, w *Writer) {
			require.NoError(t, os.Rename(record(w), record(w)+"x"))
			require.NoError(t, os.Symlink(name+"x", record(w)))
		},
		"the scope's folder is a link": func(t *testing.T, w *Writer) {
			require.NoError(t, os.Rename(filepath.Join(w.dir, "node"), filepath.Join(w.dir, "x")))
			require.NoError(t, os.Symlink("x", filepath.Join(w.dir, "node")))
		},
		"the record is a FIFO": func(t *testing.T, w *Writer) {
			require.NoError(t, os.Remove(record(w)))
			require.NoError(t, syscall.Mkfifo(record(w), 0o600))
		},
		"the record is a folder": func(t *testing.T, w *Writer) {
			require.NoError(t, os.Remove(record(w)))
			require.NoError(t, os.Mkdir(record(w), 0o700))
		},
		"the record is of 1 GB":    func(t *testing.T, w *Writer) { require.NoError(t, os.Truncate(record(w), 1<<30)) },
		"the record is empty":      func(t *testing.T, w *Writer) { require.NoError(t, os.Truncate(record(w), 0)) },
		"the record is cut off":    func(t *testing.T, w *Writer) { require.NoError(t, os.Truncate(record(w), 150)) },
		"the record is garbage":    func(t *testing.T, w *Writer) { write(t, record(w), bytes.Repeat([]byte{0xff, 0}, 1000)) },
		"a bit of it is changed":   func(t *testing.T, w *Writer) { change(t, record(w), `"u"`, `"v"`) },
		"it is of a newer version": func(t *testing.T, w *Writer) { change(t, record(w), magic+" 1 ", magic+" 2 ") },
		"it is of an older version": func(t *testing.T, w *Writer) {
			change(t, record(w), magic+" 1 ", magic+" 0 ")
		},
		"it is that of another host": func(t *testing.T, w *Writer) {
			require.NoError(t, os.Rename(filepath.Join(w.dir, "node", string(literal("r.two"))), record(w)))
		},
		"the index is that of another namespace": func(t *testing.T, w *Writer) {
			set(t, w, InNamespace("a"), nil)
			require.NoError(t, os.Rename(filepath.Join(w.dir, "ns-a", "index"), filepath.Join(w.dir, "node", "index")))
		},
	}
	if os.Geteuid() == 0 {
		tests["it has another owner"] = func(t *testing.T, w *Writer) { require.NoError(t, os.Chown(record(w), 1, 1)) }
		tests["the folder has another owner"] = func(t *testing.T, w *Writer) { require.NoError(t, os.Chown(w.dir, 1, 1)) }
	}
	for name, spoil := range tests {
		t.Run(name, func(t *testing.T) {
			w, r := open(t)
			set(t, w, Node, entries("r.one="+canary, "r.two=2"))
			spoil(t, w)
			found, err := r.Lookup(Node, image, 0)
			require.Error(t, err)
			require.Empty(t, found)
			require.NotErrorIs(t, err, ErrUnknown)
			require.NotContains(t, err.Error(), canary)
			_, err = os.Lstat(record(w))
			require.NoError(t, err, "a reader deletes nothing")
		})
	}
}

// change replaces a text in a file.
func change(t *testing.T, path, from, to string) {
	t.Helper()
	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Contains(t, string(raw), from)
	require.NoError(t, os.WriteFile(path, bytes.Replace(raw, []byte(from), []byte(to), 1), 0o600))
}

func TestOneWriterAtATime(t *testing.T) {
	t.Parallel()
	w, r := open(t)
	require.True(t, Alive(w.dir))
	_, err := Open(w.dir)
	require.ErrorIs(t, err, ErrLocked)
	set(t, w, Node, entries("r.one=1"))
	require.NoError(t, os.WriteFile(filepath.Join(w.dir, "node", temporary+"left"), nil, 0o600))
	require.NoError(t, w.Close())
	require.False(t, Alive(w.dir))
	require.Equal(t, []string{"r.one=1"}, lookup(t, r, Node, "r.one/app"), "records outlive their writer")

	again, err := Open(w.dir)
	require.NoError(t, err)
	defer func() { require.NoError(t, again.Close()) }()
	require.NoFileExists(t, filepath.Join(w.dir, "node", temporary+"left"))
	require.Equal(t, []string{"r.one=1"}, lookup(t, r, Node, "r.one/app"))
	require.False(t, Alive(filepath.Join(t.TempDir(), "nowhere")))
}

func TestACredentialDoesNotPrint(t *testing.T) {
	t.Parallel()
	w, r := open(t)
	set(t, w, Node, entries("r.one="+canary))
	found, err := r.Lookup(Node, "r.one/app", 0)
	require.NoError(t, err)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		require.NotContains(t, fmt.Sprintf(verb, found), canary, verb)
		require.NotContains(t, fmt.Sprintf(verb, &found.Credentials[0]), canary, verb)
	}
}

// Reads while a writer rewrites everything, and is killed at random: each finds a whole record, old or new.
func TestReadersAndAWriterThatIsKilled(t *testing.T) {
	if os.Getenv("IMPS_NODECACHE_WRITER") != "" {
		rewriteForever(t, os.Getenv("IMPS_NODECACHE_WRITER"))
	}
	t.Parallel()
	const reads = 10_000
	dir := filepath.Join(t.TempDir(), "imps")
	w, err := Open(dir)
	require.NoError(t, err)
	set(t, w, Node, generation(0))
	require.NoError(t, w.Close())
	r := NewReader(dir)
	kills, seen := 0, map[string]bool{lookup(t, r, Node, "r0.one/app")[0][len("r0.one="):][:1]: true}
	for n := 0; n < reads; {
		command := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestReadersAndAWriterThatIsKilled$")
		command.Env = append(os.Environ(), "IMPS_NODECACHE_WRITER="+dir)
		out, err := command.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, command.Start())
		_, err = out.Read(make([]byte, 1)) // it writes
		require.NoError(t, err)
		for until := n + reads/20; n < until; n++ {
			found, err := r.Lookup(Node, fmt.Sprintf("r%d.one/app", n%10), 0)
			require.NoError(t, err)
			require.Len(t, found.Credentials, 1)
			_, secret := found.Credentials[0].Reveal()
			require.Equal(t, strings.Repeat(secret[:1], 5000), secret, "torn")
			seen[secret[:1]] = true
			runtime.Gosched()
		}
		require.NoError(t, command.Process.Kill())
		_ = command.Wait() // it was killed
		kills++
	}
	require.Equal(t, 20, kills)
	require.Greater(t, len(seen), 1, "there was something new to read")
	w, err = Open(dir)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	left, err := filepath.Glob(filepath.Join(dir, "*", temporary+"*"))
	require.NoError(t, err)
	require.Empty(t, left)
}

// generation is ten credentials of one letter.
func generation(i int) (all []Entry) {
	for n := range 10 {
		all = append(all, Entry{Key: fmt.Sprintf("r%d.one", n), Username: password("u"), Password: password(strings.Repeat(string(rune('a'+i%26)), 5000))})
	}
	return all
}

func rewriteForever(t *testing.T, dir string) {
	t.Helper()
	w, err := Open(dir)
	for errors.Is(err, ErrLocked) { // the one before is still going
		w, err = Open(dir)
	}
	began := time.Now()
	for i := 0; err == nil && time.Since(began) < time.Minute; i++ { // or it is killed
		if _, err = w.Set(Node, generation(i)); i == 1 { // what was not there before can be read
			_, _ = os.Stdout.WriteString("+")
		}
	}
	require.NoError(t, err)
}

// Whatever stands in a file, it is a record that a writer wrote, or an error.
func FuzzDecode(f *testing.F) {
	good, err := encode(record{Group: literal("r.one"), Entries: []writtenEntry{{Key: "r.one", Username: "u", Password: "p"}}})
	require.NoError(f, err)
	f.Add(good)
	f.Add([]byte(magic + " 1 \n{}"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := decode(raw, "", literal("r.one"))
		if err == nil {
			require.Equal(t, literal("r.one"), r.Group)
		}
	})
}

// Whatever is asked for, an answer is of that host, or of Docker Hub.
func FuzzLookup(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "imps")
	w, err := Open(dir)
	require.NoError(f, err)
	defer func() { _ = w.Close() }()
	set(f, w, Node, entries("r.one=1", "*.two:5000=2", "index.docker.io=3"))
	r := NewReader(dir)
	for _, image := range []string{"r.one/app", "a.two:5000/app", "docker.io/library/nginx", "../x", "[::1]:5/x"} {
		f.Add(image)
	}
	f.Fuzz(func(t *testing.T, image string) {
		found, err := r.Lookup(Node, image, 0)
		if err != nil {
			return
		}
		host, _, _ := strings.Cut(image, "/")
		for _, c := range found.Credentials {
			require.True(t, matchesHost(c.Key(), host) || c.Key() == hubIndex)
		}
	})
}
