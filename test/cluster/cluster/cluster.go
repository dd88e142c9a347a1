// Package cluster runs a real Kubernetes control plane on loopback, for tests
// and for the demo: etcd, kube-apiserver and kube-controller-manager, built
// from Go modules and started as plain processes; and on Linux, for root, nodes
// beside it: containerd and a kubelet.
//
// It must not be imported by anything that ships, and nothing that it starts
// talks to anything but this machine. There is no scheduler, and without
// StartNode no kubelet: a Pod stays as it was written.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

const (
	// readyTimeout bounds the wait for one component; a loaded machine needs
	// some 20 s.
	readyTimeout = 2 * time.Minute
	// pollInterval is the pause between two looks at a component that is not
	// ready yet.
	pollInterval = 25 * time.Millisecond
)

// Component names one of the processes of a cluster. It is also the name of
// its binary.
type Component string

// The components, in the order in which they start.
const (
	Etcd              Component = "etcd"
	APIServer         Component = "kube-apiserver"
	ControllerManager Component = "kube-controller-manager"
)

// ErrNotRunning is returned where a component should be running and is not.
var ErrNotRunning = errors.New("component is not running")

// Cluster is a running control plane. Its methods may be called from several
// goroutines at once.
type Cluster struct {
	dir       *dataDir
	url       string
	authority *authority
	accounts  key // signs the tokens of ServiceAccounts
	admin     *rest.Config
	client    *kubernetes.Clientset
	probe     *prober
	audit     *Audit
	launcher  *launcher
	processes map[Component]*process
	progress  io.Writer

	mu    sync.Mutex
	nodes []*Node

	// lifetime is that of every process, cancel ends it; stop is Stop's body,
	// run once.
	lifetime context.Context
	cancel   context.CancelFunc
	stop     func() error
}

// Option changes how Run builds or starts a cluster.
type Option func(*settings)

type settings struct {
	etcd           string
	etcdQuota      int64
	apiServerFlags []string
	keep           bool
	progress       io.Writer
}

// WithEtcd starts the etcd at path in place of the one that goes with this
// package: for instance Debian's 3.4, on which the API server breaks off
// streaming lists with an error, since that etcd cannot report the progress of
// a watch.
func WithEtcd(path string) Option {
	return func(s *settings) { s.etcd = path }
}

// WithoutWatchList has the API server refuse streaming lists, as servers
// before Kubernetes 1.34 do, so that clients have to fall back to list and
// watch.
func WithoutWatchList() Option {
	return WithAPIServerFlags("--feature-gates=WatchList=false")
}

// WithAPIServerFlags adds flags to the API server's command line, after the
// package's own, so that they win.
func WithAPIServerFlags(flags ...string) Option {
	return func(s *settings) { s.apiServerFlags = append(s.apiServerFlags, flags...) }
}

// WithKeep keeps the data folder with the logs after Stop, as a non-empty
// CLUSTER_KEEP in the environment does. The caller removes it.
func WithKeep() Option {
	return func(s *settings) { s.keep = true }
}

// WithProgress sets where builds and kept folders are reported, a line each;
// the default is the standard error.
func WithProgress(w io.Writer) Option {
	return func(s *settings) { s.progress = w }
}

// Run builds what is missing, starts a control plane and returns when it
// serves: the API server is ready, and the controller manager has made the
// ServiceAccount "default" of namespace "default". The first build on a
// machine takes about ten minutes, as long as a test may take by default:
// `go run ./test/cluster build` has no such limit.
//
// The context bounds the start only; Stop ends the cluster. When Run fails,
// nothing is left running, and the error holds the end of the log of the
// component that failed.
func Run(ctx context.Context, opts ...Option) (*Cluster, error) {
	s := settings{etcdQuota: defaultEtcdQuota, keep: os.Getenv("CLUSTER_KEEP") != "", progress: os.Stderr}
	for _, opt := range opts {
		opt(&s)
	}
	binaries, err := Build(ctx, s.progress)
	if err != nil {
		return nil, fmt.Errorf("provide the binaries: %w", err)
	}
	if s.etcd != "" {
		// Absolute, since it is started in another folder.
		if binaries.Etcd, err = filepath.Abs(s.etcd); err != nil {
			return nil, fmt.Errorf("find etcd: %w", err)
		}
	}
	sweep(os.TempDir())
	dir, err := newDataDir(s.keep)
	if err != nil {
		return nil, fmt.Errorf("create the data folder: %w", err)
	}

	launcher, err := newLauncher(nil)
	if err != nil {
		return nil, errors.Join(err, dir.close())
	}
	c := &Cluster{dir: dir, launcher: launcher, processes: map[Component]*process{}, progress: s.progress}
	c.lifetime, c.cancel = context.WithCancel(context.WithoutCancel(ctx))
	c.stop = sync.OnceValue(c.end)
	if err := c.start(ctx, binaries, s); err != nil {
		return nil, errors.Join(err, c.Stop())
	}
	return c, nil
}

// start brings the components up one after the other, each as early as the one
// before it lets it.
func (c *Cluster) start(ctx context.Context, binaries Binaries, s settings) error {
	c.add(Etcd, binaries.Etcd, etcdArgs(s.etcdQuota))
	if err := c.startEtcd(); err != nil {
		return err
	}

	if err := c.prepare(ctx); err != nil {
		return err
	}
	port, err := freePort(ctx)
	if err != nil {
		return err
	}
	c.url = fmt.Sprintf("https://127.0.0.1:%d", port)
	if err := c.setUpAccess(); err != nil {
		return err
	}

	if err := c.awaitEtcd(ctx); err != nil {
		return err
	}
	apiServer := c.add(APIServer, binaries.APIServer, append(apiServerArgs(port), s.apiServerFlags...))
	if err := apiServer.start(); err != nil {
		return err
	}
	if err := c.awaitReady(ctx); err != nil {
		return err
	}

	if binaries.ControllerManager == "" {
		return nil
	}
	// Not earlier: it looks for a healthy API server once a second only, and
	// gives up after ten.
	manager := c.add(ControllerManager, binaries.ControllerManager, controllerManagerArgs())
	if err := manager.start(); err != nil {
		return err
	}
	return manager.await(ctx, func(ctx context.Context) error {
		_, err := c.client.CoreV1().ServiceAccounts(metav1.NamespaceDefault).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
}

// prepare writes the files that the components are started with.
func (c *Cluster) prepare(ctx context.Context) error {
	var err error
	if c.authority, err = newAuthority(); err != nil {
		return err
	}
	serving, err := c.authority.serving(string(APIServer))
	if err != nil {
		return err
	}
	accounts, err := newKey()
	if err != nil {
		return err
	}
	c.accounts = accounts
	token := randomToken()
	c.admin = &rest.Config{BearerToken: token, QPS: -1}

	files := map[string][]byte{
		authorityFile:   c.authority.pem,
		servingCertFile: serving.cert,
		servingKeyFile:  serving.key,
		accountKeyFile:  accounts.pem,
		tokenFile:       []byte(token + `,admin,admin,"system:masters"` + "\n"),
		auditPolicyFile: []byte(auditPolicy),
		auditLogFile:    nil,
		"README":        []byte("Data of a throw-away control plane; safe to delete when nothing runs.\n"),
	}
	for name, content := range files {
		if err := os.WriteFile(c.dir.path(name), content, 0o600); err != nil {
			return fmt.Errorf("write a start file: %w", err)
		}
	}
	c.audit = &Audit{path: c.dir.path(auditLogFile)}
	return ctx.Err()
}

// setUpAccess makes the clients and kubeconfigs, which need the server's
// address.
func (c *Cluster) setUpAccess() error {
	c.admin.Host = c.url
	c.admin.CAData = c.authority.pem
	var err error
	if c.client, err = kubernetes.NewForConfig(c.admin); err != nil {
		return fmt.Errorf("create the admin's client: %w", err)
	}
	c.probe = newProber(c.url, c.admin.BearerToken, c.authority)
	if err := c.WriteKubeconfig(c.Kubeconfig(), c.Admin()); err != nil {
		return err
	}
	manager, err := c.ConfigForUser("system:kube-controller-manager")
	if err != nil {
		return err
	}
	return c.WriteKubeconfig(c.dir.path(managerKubeconfig), manager)
}

func (c *Cluster) add(name Component, path string, args []string) *process {
	p := &process{
		name: name, path: path, args: args, lifetime: c.lifetime, launcher: c.launcher,
		dir: c.dir.root, log: c.dir.path(string(name) + ".log"),
	}
	c.processes[name] = p
	return p
}

// startEtcd starts etcd without the socket of a run before it, so that the
// socket's presence says that etcd listens.
func (c *Cluster) startEtcd() error {
	etcd := c.processes[Etcd]
	if !etcd.running() {
		if err := os.Remove(c.dir.path(etcdSocket)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove etcd's old socket: %w", err)
		}
	}
	return etcd.start()
}

func (c *Cluster) awaitEtcd(ctx context.Context) error {
	return c.processes[Etcd].await(ctx, func(context.Context) error {
		_, err := os.Stat(c.dir.path(etcdSocket))
		return err
	})
}

func (c *Cluster) awaitReady(ctx context.Context) error {
	return c.processes[APIServer].await(ctx, c.probe.ready)
}

// Stop kills the components, waits until they are gone and removes the data
// folder, unless it is to be kept. Calls after the first do nothing and return
// what the first returned.
func (c *Cluster) Stop() error {
	return c.stop()
}

func (c *Cluster) end() error {
	c.mu.Lock()
	nodes := c.nodes
	c.mu.Unlock()
	var errs []error
	for _, node := range nodes {
		errs = append(errs, node.Stop())
	}
	// Nothing of a throw-away cluster is worth an orderly shutdown: the kill
	// that the cancellation sends is quick and cannot hang.
	c.cancel()
	for _, p := range c.processes {
		p.kill()
	}
	c.launcher.close()
	if c.probe != nil {
		c.probe.close()
	}
	if c.dir.keep {
		// A progress line that cannot be written must not fail the stop.
		_, _ = fmt.Fprintf(c.progress, "cluster: logs and data kept in %s\n", c.dir.root)
	}
	if err := c.dir.close(); err != nil {
		errs = append(errs, fmt.Errorf("remove the data folder: %w", err))
	}
	return errors.Join(errs...)
}

// Dir returns the data folder, which Stop removes. The log of a component is
// the file NAME.log in it.
func (c *Cluster) Dir() string {
	return c.dir.root
}

// Audit returns the API server's audit log.
func (c *Cluster) Audit() *Audit {
	return c.audit
}

// StopAPIServer kills the API server as a crash would, and returns when it is
// gone. Connections to it break, new ones are refused. It returns an
// ErrNotRunning when it is down already.
func (c *Cluster) StopAPIServer() error {
	return c.halt(APIServer)
}

// StartAPIServer starts the API server again, on the same address and data,
// and returns when it is ready.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	apiServer := c.processes[APIServer]
	if !apiServer.running() {
		if err := c.audit.dropPartial(); err != nil {
			return err
		}
	}
	if err := apiServer.start(); err != nil {
		return err
	}
	return c.awaitReady(ctx)
}

// StopEtcd kills etcd as a crash would, and returns when it is gone. The API
// server stays and fails every request that needs the store. It returns an
// ErrNotRunning when it is down already.
func (c *Cluster) StopEtcd() error {
	return c.halt(Etcd)
}

// StartEtcd starts etcd again, on the same data, and returns when it listens
// and, where the API server runs, when that is ready again.
func (c *Cluster) StartEtcd(ctx context.Context) error {
	if err := c.startEtcd(); err != nil {
		return err
	}
	if err := c.awaitEtcd(ctx); err != nil {
		return err
	}
	if !c.processes[APIServer].running() {
		return nil
	}
	return c.awaitReady(ctx)
}

// RestartControllerManager kills the controller manager and starts it again,
// with more flags after the package's own, so that they win. It returns when
// the garbage collector works, and knows every kind that is there.
func (c *Cluster) RestartControllerManager(ctx context.Context, flags ...string) error {
	if err := c.halt(ControllerManager); err != nil {
		return err
	}
	manager := c.processes[ControllerManager]
	manager.args = append(controllerManagerArgs(), flags...)
	if err := manager.start(); err != nil {
		return err
	}
	const name = "imps-test-garbage"
	maps := c.client.CoreV1().ConfigMaps(metav1.NamespaceDefault)
	garbage := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, OwnerReferences: []metav1.OwnerReference{
		{APIVersion: "v1", Kind: "ConfigMap", Name: "never-there", UID: "00000000-0000-0000-0000-000000000000"},
	}}}
	if _, err := maps.Create(ctx, garbage, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("create something to collect: %w", err)
	}
	return manager.await(ctx, func(ctx context.Context) error {
		_, err := maps.Get(ctx, name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			return nil
		case err != nil:
			return err
		}
		return errors.New("the garbage collector has collected nothing yet")
	})
}

func (c *Cluster) halt(name Component) error {
	if p := c.processes[name]; p == nil || !p.kill() {
		return fmt.Errorf("stop %s: %w", name, ErrNotRunning)
	}
	return nil
}

// Signal sends a signal to a component, for instance SIGSTOP and SIGCONT for
// one that hangs, or SIGTERM for an orderly end. It returns an ErrNotRunning
// when the component is not there.
func (c *Cluster) Signal(name Component, sig syscall.Signal) error {
	p, ok := c.processes[name]
	if !ok {
		return fmt.Errorf("signal %q: %w", name, ErrNotRunning)
	}
	return p.signal(sig)
}

// Start starts a program that ends with the process that runs the cluster at
// the latest, also where that is killed. The caller ends it before Stop.
func (c *Cluster) Start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true // an interrupt reaches the parent only, which then ends it in order
	dieWithParent(cmd.SysProcAttr)
	return c.launcher.start(cmd)
}

// retryNotFound repeats try while it answers "not found", for objects that a
// controller makes within moments, up to ten seconds.
func retryNotFound(ctx context.Context, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := try(ctx)
		if !apierrors.IsNotFound(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

// tail returns the last lines of a file, for error messages.
func tail(path string) string {
	const size = 4 << 10
	f, err := os.Open(path) //nolint:gosec // a log of a component, in the data folder
	if err != nil {
		return err.Error()
	}
	defer func() { _ = f.Close() }()
	if info, err := f.Stat(); err == nil && info.Size() > size {
		if _, err := f.Seek(-size, io.SeekEnd); err != nil {
			return err.Error()
		}
	}
	text, err := io.ReadAll(f)
	if err != nil {
		return err.Error()
	}
	return string(text)
}
