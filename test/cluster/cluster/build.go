package cluster

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// rootModule is the module in whose folder test/cluster/modules is.
	rootModule = "github.com/imps-node/imps"
	// progressInterval is the time between two lines about a build.
	progressInterval = 5 * time.Second
	// lockInterval is the time between two looks at another process's build.
	lockInterval = 200 * time.Millisecond
)

// Binaries are the paths of the programs that a cluster runs.
type Binaries struct {
	Etcd      string
	APIServer string
	// ControllerManager is empty where KUBEBUILDER_ASSETS has none: nothing
	// then makes ServiceAccounts or collects garbage.
	ControllerManager string
}

// NodeBinaries are the paths of the programs that a node runs; containerd finds
// its shim beside it.
type NodeBinaries struct {
	Kubelet    string
	Containerd string
	Ctr        string
}

// module is a Go module below test/cluster/modules that pins programs.
type module struct {
	folder string
	// pinned is the module whose version counts.
	pinned   string
	packages []string
	// tags are build tags, if any.
	tags string
	// output is the name of the binary where it is not that of the package;
	// for modules of one package.
	output string
	// version makes the linker flags that tell the programs their version.
	version func(version string) []string
}

func etcdModule() module {
	return module{
		folder:   "etcd",
		pinned:   "go.etcd.io/etcd/server/v3",
		packages: []string{"go.etcd.io/etcd/server/v3"},
		output:   string(Etcd),
		version:  func(string) []string { return nil },
	}
}

func kubernetesModule() module {
	return module{
		folder: "kubernetes",
		pinned: "k8s.io/kubernetes",
		packages: []string{
			"k8s.io/kubernetes/cmd/kube-apiserver",
			"k8s.io/kubernetes/cmd/kube-controller-manager",
		},
		version: kubernetesVersion,
	}
}

// kubeletModule is apart from kubernetesModule, for those who need no node.
func kubeletModule() module {
	return module{
		folder:   "kubernetes",
		pinned:   "k8s.io/kubernetes",
		packages: []string{"k8s.io/kubernetes/cmd/kubelet"},
		version:  kubernetesVersion,
	}
}

func containerdModule() module {
	const path = "github.com/containerd/containerd/v2"
	return module{
		folder:   "containerd",
		pinned:   path,
		packages: []string{path + "/cmd/containerd", path + "/cmd/containerd-shim-runc-v2", path + "/cmd/ctr"},
		tags:     "no_btrfs,no_devmapper,no_zfs",
		version:  func(string) []string { return nil },
	}
}

// kubernetesVersion names the version as Kubernetes' own build does. Without
// it, the servers take themselves for v0.0.0 and choose features by that.
func kubernetesVersion(version string) []string {
	const variable = "-X k8s.io/component-base/version."
	parts := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	flags := []string{
		variable + "gitVersion=" + version,
		variable + "gitCommit=module",
		variable + "gitTreeState=clean",
	}
	if len(parts) == 3 {
		flags = append(flags, variable+"gitMajor="+parts[0], variable+"gitMinor="+parts[1])
	}
	return flags
}

// Build returns the programs of a cluster. Where KUBEBUILDER_ASSETS is set they
// are the ones in that folder; otherwise they come from the user's cache, and
// what is not there is built and put there, which takes about ten minutes the
// first time. Builds report to progress every few seconds. Several processes
// may build at once: one does, the others wait.
//
// The modules to build are looked up from the current folder, which has to be
// in this repository or in a module that requires it.
func Build(ctx context.Context, progress io.Writer) (Binaries, error) {
	if assets := os.Getenv("KUBEBUILDER_ASSETS"); assets != "" {
		return fromAssets(assets)
	}
	b, err := newBuilder(ctx, progress)
	if err != nil {
		return Binaries{}, err
	}
	etcd, err := b.provide(ctx, etcdModule())
	if err != nil {
		return Binaries{}, err
	}
	kubernetes, err := b.provide(ctx, kubernetesModule())
	if err != nil {
		return Binaries{}, err
	}
	return Binaries{
		Etcd:              filepath.Join(etcd, string(Etcd)),
		APIServer:         filepath.Join(kubernetes, string(APIServer)),
		ControllerManager: filepath.Join(kubernetes, string(ControllerManager)),
	}, nil
}

// BuildNode returns the programs of a node, which Build does not: they come from
// the user's cache in the same way, whatever KUBEBUILDER_ASSETS says. The first
// build takes some minutes.
func BuildNode(ctx context.Context, progress io.Writer) (NodeBinaries, error) {
	b, err := newBuilder(ctx, progress)
	if err != nil {
		return NodeBinaries{}, err
	}
	kubelet, err := b.provide(ctx, kubeletModule())
	if err != nil {
		return NodeBinaries{}, err
	}
	containerd, err := b.provide(ctx, containerdModule())
	if err != nil {
		return NodeBinaries{}, err
	}
	return NodeBinaries{
		Kubelet:    filepath.Join(kubelet, "kubelet"),
		Containerd: filepath.Join(containerd, "containerd"),
		Ctr:        filepath.Join(containerd, "ctr"),
	}, nil
}

func fromAssets(folder string) (Binaries, error) {
	folder, err := filepath.Abs(folder)
	if err != nil {
		return Binaries{}, fmt.Errorf("find KUBEBUILDER_ASSETS: %w", err)
	}
	b := Binaries{
		Etcd:              filepath.Join(folder, string(Etcd)),
		APIServer:         filepath.Join(folder, string(APIServer)),
		ControllerManager: filepath.Join(folder, string(ControllerManager)),
	}
	var missing []string
	for _, file := range []string{b.Etcd, b.APIServer} {
		if _, err := os.Stat(file); err != nil {
			missing = append(missing, filepath.Base(file))
		}
	}
	if len(missing) > 0 {
		return Binaries{}, fmt.Errorf("KUBEBUILDER_ASSETS=%s lacks %s", folder, strings.Join(missing, " and "))
	}
	if _, err := os.Stat(b.ControllerManager); err != nil {
		b.ControllerManager = ""
	}
	return b, nil
}

// builder keeps built modules in a cache, one folder each.
type builder struct {
	modules  string // folder of the modules' sources
	cache    string
	progress io.Writer
}

func newBuilder(ctx context.Context, progress io.Writer) (*builder, error) {
	root, err := goOutput(ctx, "", "list", "-m", "-f", "{{.Dir}}", rootModule)
	if err != nil {
		return nil, fmt.Errorf("find the modules to build (inside the repository, or set KUBEBUILDER_ASSETS): %w", err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, fmt.Errorf("find the cache folder: %w", err)
	}
	return &builder{
		modules:  filepath.Join(root, "test", "cluster", "modules"),
		cache:    filepath.Join(cache, "imps", "cluster"),
		progress: progress,
	}, nil
}

// provide returns the folder with the module's programs, and builds them first
// where the cache lacks them. A folder in the cache is complete: it gets its
// name when everything is in it.
func (b *builder) provide(ctx context.Context, m module) (string, error) {
	source := filepath.Join(b.modules, m.folder)
	version, err := pinnedVersion(filepath.Join(source, "go.mod"), m.pinned)
	if err != nil {
		return "", err
	}
	flags := []string{"-trimpath", "-ldflags=" + strings.Join(append([]string{"-s", "-w"}, m.version(version)...), " ")}
	if m.tags != "" {
		flags = append(flags, "-tags="+m.tags)
	}
	key, err := cacheKey(ctx, source, append(flags, m.packages...))
	if err != nil {
		return "", err
	}
	folder := filepath.Join(b.cache, fmt.Sprintf("%s-%s-%s", m.folder, version, key))
	if exists(folder) {
		return folder, nil
	}

	if err := os.MkdirAll(b.cache, 0o750); err != nil {
		return "", fmt.Errorf("create the cache: %w", err)
	}
	lock, err := b.lock(ctx, folder)
	if err != nil {
		return "", err
	}
	defer func() { _ = lock.Close() }()
	if exists(folder) { // built by whoever held the lock
		return folder, nil
	}
	// Nobody else builds this now: what is there is left from a build that died.
	stale, err := filepath.Glob(folder + ".tmp-*")
	if err != nil {
		return "", fmt.Errorf("look for unfinished builds: %w", err)
	}
	for _, dir := range stale {
		if err := os.RemoveAll(dir); err != nil {
			return "", fmt.Errorf("remove an unfinished build: %w", err)
		}
	}
	unfinished, err := os.MkdirTemp(b.cache, filepath.Base(folder)+".tmp-*")
	if err != nil {
		return "", fmt.Errorf("create a build folder: %w", err)
	}
	if err := b.compile(ctx, m, version, source, unfinished, flags); err != nil {
		return "", errors.Join(fmt.Errorf("build %s: %w", m.names(), err), os.RemoveAll(unfinished))
	}
	if err := os.Rename(unfinished, folder); err != nil {
		return "", fmt.Errorf("put a build into the cache: %w", err)
	}
	return folder, nil
}

// lock waits until this process is the only one that builds the folder.
func (b *builder) lock(ctx context.Context, folder string) (*os.File, error) {
	tick := time.NewTicker(lockInterval)
	defer tick.Stop()
	for told := false; ; told = true {
		lock, err := lockFile(folder + ".lock")
		if !errors.Is(err, errLocked) {
			return lock, err
		}
		if !told {
			b.report("waiting for another process to build %s", filepath.Base(folder))
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for another process to build %s: %w", filepath.Base(folder), context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// compile builds the module's programs into a folder.
func (b *builder) compile(ctx context.Context, m module, version, source, folder string, flags []string) error {
	begin := time.Now()
	b.report("building %s %s from Go modules; the first time takes minutes", m.names(), version)
	list, err := goOutput(ctx, source, append([]string{"list", "-deps", "-tags=" + m.tags}, m.packages...)...)
	if err != nil {
		return err
	}
	count := newBuildCounter(strings.Fields(list))

	output := folder + string(filepath.Separator)
	if m.output != "" {
		output = filepath.Join(folder, m.output)
	}
	args := append([]string{"build", "-v", "-o", output}, flags...)
	cmd := goCommand(ctx, source, append(args, m.packages...)...)
	cmd.Stderr = count
	finished := make(chan error, 1)
	go func() { finished <- runTied(cmd) }()

	tick := time.NewTicker(progressInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			compiled, total := count.progress()
			b.report("building %s: %d of at most %d packages compiled, %s",
				m.names(), compiled, total, time.Since(begin).Round(time.Second))
		case err := <-finished:
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				return fmt.Errorf("%w: %s", err, count.messages())
			}
			b.report("built %s in %s", m.names(), time.Since(begin).Round(time.Second))
			return nil
		}
	}
}

func (b *builder) report(format string, args ...any) {
	// A progress line that cannot be written must not fail the build.
	_, _ = fmt.Fprintf(b.progress, "cluster: "+format+"\n", args...)
}

func (m *module) names() string {
	if m.output != "" {
		return m.output
	}
	names := make([]string, 0, len(m.packages))
	for _, pkg := range m.packages {
		names = append(names, path.Base(pkg))
	}
	return strings.Join(names, ", ")
}

// runTied runs a command that dies with this process.
func runTied(cmd *exec.Cmd) error {
	// See launcher: the thread has to live as long as the command.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	dieWithParent(cmd.SysProcAttr)
	return cmd.Run()
}

// buildCounter takes the standard error of `go build -v`: the path of each
// package when its compilation starts, and whatever goes wrong. Packages that
// Go's own cache holds do not show up.
type buildCounter struct {
	packages map[string]bool

	mu       sync.Mutex
	compiled int
	partial  []byte
	other    bytes.Buffer
}

func newBuildCounter(packages []string) *buildCounter {
	c := &buildCounter{packages: make(map[string]bool, len(packages))}
	for _, pkg := range packages {
		c.packages[pkg] = true
	}
	return c
}

// Write implements io.Writer; it never fails.
func (c *buildCounter) Write(text []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.partial = append(c.partial, text...)
	for {
		line, rest, found := bytes.Cut(c.partial, []byte("\n"))
		if !found {
			return len(text), nil
		}
		if c.packages[string(line)] {
			c.compiled++
		} else {
			c.other.Write(append(line, '\n'))
		}
		c.partial = rest
	}
}

func (c *buildCounter) progress() (compiled, total int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.compiled, len(c.packages)
}

func (c *buildCounter) messages() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.TrimSpace(c.other.String() + string(c.partial))
}

// pinnedVersion returns the version at which a go.mod file requires a module.
func pinnedVersion(file, name string) (string, error) {
	text, err := os.ReadFile(file) //nolint:gosec // the go.mod of a module in this repository
	if err != nil {
		return "", fmt.Errorf("read the pinned version: %w", err)
	}
	match := regexp.MustCompile(`(?m)^(?:require )?\s*` + regexp.QuoteMeta(name) + ` (v\S+)`).FindSubmatch(text)
	if match == nil {
		return "", fmt.Errorf("read the pinned version: %s does not require %s", file, name)
	}
	return string(match[1]), nil
}

// cacheKey is a hash of everything that the programs are made from.
func cacheKey(ctx context.Context, source string, args []string) (string, error) {
	compiler, err := goOutput(ctx, source, "env", "GOVERSION")
	if err != nil {
		return "", err
	}
	hash := sha256.New()
	for _, name := range []string{"go.mod", "go.sum"} {
		text, err := os.ReadFile(filepath.Join(source, name)) //nolint:gosec // two files of a module in this repository
		if err != nil {
			return "", fmt.Errorf("hash the module: %w", err)
		}
		hash.Write(text)
	}
	for _, part := range append([]string{compiler, runtime.GOOS, runtime.GOARCH}, args...) {
		hash.Write([]byte(part + "\x00"))
	}
	return hex.EncodeToString(hash.Sum(nil))[:16], nil
}

// goCommand prepares a call of the go tool in a folder, for this machine and
// without C, whatever the caller's environment says.
func goCommand(ctx context.Context, folder string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", args...) //nolint:gosec // the go tool, with arguments made in this file
	cmd.Dir = folder
	cmd.Env = append(os.Environ(),
		"CGO_ENABLED=0", "GOFLAGS=-mod=readonly", "GOWORK=off", "GOOS="+runtime.GOOS, "GOARCH="+runtime.GOARCH)
	// The compilers that go starts hold its output open for a moment longer.
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// goOutput returns what a call of the go tool prints.
func goOutput(ctx context.Context, folder string, args ...string) (string, error) {
	cmd := goCommand(ctx, folder, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("go %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(string(out)), nil
}

func exists(path string) bool {
	_, err := os.Stat(path) //nolint:gosec // only whether it is there
	return err == nil
}
