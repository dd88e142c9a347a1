package imps

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/imps-node/imps/test/cluster/cluster"
)

// stopTimeout is how long a process may take to end; imps promises five seconds.
const stopTimeout = 10 * time.Second

// Spec is an imps-node to run.
type Spec struct {
	// Name tells it from the others of its folder.
	Name string
	// Args and Env are the container's.
	Args, Env []string
	// Config is how it reaches the API server. Where it has a BearerTokenFile, the token is
	// read from there.
	Config *rest.Config
}

// Process is an imps-node that runs, or has ended.
type Process struct {
	Name string
	// LogFile is the path of its log.
	LogFile string

	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

// Start starts a binary by its spec, with its kubeconfig and its log in dir, and does not
// wait until it is ready. What it logs is appended where it is started again. ctx kills it.
func Start(ctx context.Context, control *cluster.Cluster, binary, dir string, spec Spec) (*Process, error) {
	kubeconfig := filepath.Join(dir, spec.Name+".kubeconfig")
	if err := control.WriteKubeconfig(kubeconfig, spec.Config); err != nil {
		return nil, err
	}
	if file := spec.Config.BearerTokenFile; file != "" {
		if err := useTokenFile(kubeconfig, file); err != nil {
			return nil, fmt.Errorf("write kubeconfig %s: %w", kubeconfig, err)
		}
	}
	p := &Process{Name: spec.Name, LogFile: filepath.Join(dir, spec.Name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the log of %s: %w", spec.Name, err)
	}
	defer func() { _ = log.Close() }() // the process has its own copy
	// Any free ports; the log says which.
	args := append(append([]string{}, spec.Args...),
		"--kubeconfig="+kubeconfig, "--metrics-addr=127.0.0.1:0", "--health-addr=127.0.0.1:0", "--log-format=text")
	p.cmd = exec.CommandContext(ctx, binary, args...) //nolint:gosec // the binary that was just built
	p.cmd.Dir = dir
	p.cmd.Stdout, p.cmd.Stderr = log, log
	// Nothing of the caller's settings reaches it.
	p.cmd.Env = append([]string{"POD_NAMESPACE=" + SystemNamespace}, spec.Env...)
	if err := control.Start(p.cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Name, err)
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait() // ProcessState tells all of it
	}()
	return p, nil
}

// useTokenFile has a kubeconfig name a file in place of its tokens.
func useTokenFile(kubeconfig, file string) error {
	config, err := clientcmd.LoadFromFile(kubeconfig)
	if err != nil {
		return err
	}
	for _, user := range config.AuthInfos {
		user.Token, user.TokenFile = "", file
	}
	return clientcmd.WriteToFile(*config, kubeconfig)
}

// Signal sends a signal: SIGKILL for a crash, SIGSTOP and SIGCONT for a process that is
// suspended.
func (p *Process) Signal(sig syscall.Signal) error { return p.cmd.Process.Signal(sig) }

// Ended is closed once the process has ended.
func (p *Process) Ended() <-chan struct{} { return p.done }

// Kill ends it as a crash would, and waits until it is gone.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.done
}

// Terminate ends it as Kubernetes does, and returns an error where it does not end in time
// with exit code 0.
func (p *Process) Terminate() error {
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("%s: %w", p.Name, err)
	}
	select {
	case <-p.done:
	case <-time.After(stopTimeout):
		p.Kill()
		return fmt.Errorf("%s does not end on SIGTERM", p.Name)
	}
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		return fmt.Errorf("%s ends with exit code %d", p.Name, code)
	}
	return nil
}

// AwaitReady waits until its own probe says that it is ready.
func (p *Process) AwaitReady(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := p.get(ctx, "healthAddr", "/readyz")
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended before it was ready: %s; its log:\n%s", p.Name, p.cmd.ProcessState, p.Log())
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w; its log:\n%s", p.Name, err, p.Log())
		case <-tick.C:
		}
	}
}

// Metrics returns what its /metrics says.
func (p *Process) Metrics(ctx context.Context) (string, error) {
	return p.get(ctx, "metricsAddr", "/metrics")
}

// Log returns what it has logged.
func (p *Process) Log() string {
	text, err := os.ReadFile(p.LogFile)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Usage is what a process uses of the machine.
type Usage struct {
	ResidentBytes, PeakBytes int64
	Descriptors              int
}

// Usage returns what it uses now, by /proc.
func (p *Process) Usage() (Usage, error) {
	proc := filepath.Join("/proc", strconv.Itoa(p.cmd.Process.Pid))
	status, err := os.ReadFile(filepath.Join(proc, "status")) //nolint:gosec // of our own process
	if err != nil {
		return Usage{}, err
	}
	descriptors, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		return Usage{}, err
	}
	u := Usage{Descriptors: len(descriptors)}
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		bytes := map[string]*int64{"VmRSS": &u.ResidentBytes, "VmHWM": &u.PeakBytes}[key]
		if bytes == nil {
			continue
		}
		var kib int64
		if _, err := fmt.Sscan(value, &kib); err != nil {
			return Usage{}, fmt.Errorf("%s of %s: %w", key, p.Name, err)
		}
		*bytes = kib << 10
	}
	return u, nil
}

// Logged returns the last value that it logged for a key, empty where there is none yet.
func (p *Process) Logged(key string) string {
	matches := regexp.MustCompile(`\b`+key+`=(\S+)`).FindAllStringSubmatch(p.Log(), -1)
	if len(matches) == 0 {
		return ""
	}
	return matches[len(matches)-1][1] // of its last start
}

// get asks one of its servers, whose address stands in its log.
func (p *Process) get(ctx context.Context, addressKey, path string) (string, error) {
	address := p.Logged(addressKey)
	if address == "" {
		return "", fmt.Errorf("its log has no %s", addressKey)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+path, nil)
	if err != nil {
		return "", err
	}
	answer, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(request)
	if err != nil {
		return "", err
	}
	defer func() { _ = answer.Body.Close() }()
	body, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = errors.New(path + " says " + answer.Status)
	}
	return string(body), err
}
