// Package cmd_test runs the built imps-node against a real API server, as the chart
// would: its own process, with the tokens of its own ServiceAccounts.
package cmd_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/rest"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

const (
	systemNamespace = imps.SystemNamespace
	sourceNamespace = imps.SourceNamespace
	root            = "../.."
	testVersion     = "v0.0.0-test"

	// patience bounds every wait; what is waited for takes a moment.
	patience = 30 * time.Second
	// pause is the time between two looks.
	pause = 20 * time.Millisecond
)

var (
	// control is the control plane of all tests; they do not run in parallel, since some
	// stop it and all share the one Lease.
	control *cluster.Cluster
	// binary is the built imps-node.
	binary string
)

func TestMain(m *testing.M) {
	os.Exit(imps.RunTests(m, root, &control, func(ctx context.Context, dir string) (err error) {
		binary, err = imps.Build(ctx, root, dir, "-ldflags", "-X main.version="+testVersion)
		return err
	}))
}

// kubeconfig writes a file that connects as config does.
func kubeconfig(t *testing.T, config *rest.Config) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	require.NoError(t, control.WriteKubeconfig(path, config))
	return path
}

// coordinatorKubeconfig has a token of the coordinator's ServiceAccount.
func coordinatorKubeconfig(t *testing.T) string {
	t.Helper()
	token, err := control.Token(t.Context(), systemNamespace, "imps-coordinator")
	require.NoError(t, err)
	return kubeconfig(t, control.ConfigForToken(token))
}

// agentKubeconfig has a token of the agent's ServiceAccount, bound to a Pod on the node.
func agentKubeconfig(t *testing.T, node string) string {
	t.Helper()
	require.NoError(t, control.Node(t.Context(), node))
	token, err := control.NodeToken(t.Context(), systemNamespace, "imps-node", node)
	require.NoError(t, err)
	return kubeconfig(t, control.ConfigForToken(token))
}

// process is a running `imps-node run`.
type process struct {
	command *exec.Cmd
	// metrics and health are the addresses that it listens on.
	metrics, health string
	// ended is closed once it has exited.
	ended chan struct{}

	mu   sync.Mutex
	logs []map[string]any
	raw  bytes.Buffer
}

// start runs imps-node, logs at debug, and returns once it says that it starts. Servers
// listen on free ports.
func start(t *testing.T, args ...string) *process {
	t.Helper()
	args = append([]string{"run", "--metrics-addr=127.0.0.1:0", "--health-addr=127.0.0.1:0", "--log-level=debug"}, args...)
	p := &process{command: exec.CommandContext(context.WithoutCancel(t.Context()), binary, args...), ended: make(chan struct{})}
	p.command.Env = []string{"HOME=" + t.TempDir()}
	stderr, err := p.command.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, p.command.Start())
	go func() {
		defer close(p.ended)
		p.read(stderr)
		_ = p.command.Wait() // the exit code says it
	}()
	t.Cleanup(func() {
		_ = p.command.Process.Kill() // it may have exited
		<-p.ended
		if t.Failed() {
			t.Logf("imps-node %s:\n%s", strings.Join(args, " "), p.stderr())
		}
	})
	starting := p.awaitLog(t, "starting")
	p.metrics, _ = starting["metricsAddr"].(string)
	p.health, _ = starting["healthAddr"].(string)
	return p
}

func (p *process) read(stderr io.Reader) {
	lines := bufio.NewScanner(stderr)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var line map[string]any
		err := json.Unmarshal(lines.Bytes(), &line)
		p.mu.Lock()
		p.raw.Write(append(lines.Bytes(), '\n'))
		if err != nil {
			line = map[string]any{"msg": "a line that is not JSON: " + lines.Text()}
		}
		p.logs = append(p.logs, line)
		p.mu.Unlock()
	}
}

func (p *process) stderr() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.raw.String()
}

// logged returns the lines with a message.
func (p *process) logged(message string) []map[string]any {
	p.mu.Lock()
	defer p.mu.Unlock()
	var lines []map[string]any
	for _, line := range p.logs {
		if text, _ := line["msg"].(string); strings.HasPrefix(text, message) {
			lines = append(lines, line)
		}
	}
	return lines
}

func (p *process) awaitLog(t *testing.T, message string) map[string]any {
	t.Helper()
	require.Eventually(t, func() bool { return len(p.logged(message)) > 0 || p.hasEnded() }, patience, pause)
	lines := p.logged(message)
	require.NotEmpty(t, lines, "it ended without the log line %q: %s", message, p.stderr())
	return lines[0]
}

func (p *process) hasEnded() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// awaitEnd returns the exit code.
func (p *process) awaitEnd(t *testing.T) int {
	t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		require.Fail(t, "it does not end")
	}
	return p.command.ProcessState.ExitCode()
}

// terminate asks the process to end, and returns its exit code and how long it took.
func (p *process) terminate(t *testing.T) (code int, took time.Duration) {
	t.Helper()
	begin := time.Now()
	require.NoError(t, p.command.Process.Signal(syscall.SIGTERM))
	return p.awaitEnd(t), time.Since(begin)
}

// get returns the answer to a GET request; code 0 where there is none.
func get(t *testing.T, address, path string) (code int, body string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address+path, nil)
	require.NoError(t, err)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Do(request)
	if err != nil {
		return 0, err.Error()
	}
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(response.Body)
	require.NoError(t, err)
	return response.StatusCode, string(text)
}

func (p *process) awaitReady(t *testing.T) {
	t.Helper()
	require.Eventually(t, func() bool {
		code, _ := get(t, p.health, "/readyz")
		return code == http.StatusOK || p.hasEnded()
	}, patience, pause)
	require.False(t, p.hasEnded())
}
