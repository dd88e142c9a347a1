package faults

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imps-node/imps/test/imps"
)

// clockVariable says by how many seconds the wall clock of a process is wrong.
const clockVariable = "IMPS_TEST_CLOCK"

// wrongClock is one more file of package time.
const wrongClock = `package time

import "syscall"

// wrong is by how many seconds the wall clock is wrong.
var wrong = func() (seconds int64) {
	text, _ := syscall.Getenv("` + clockVariable + `")
	sign := int64(1)
	for _, c := range text {
		if c == '-' {
			sign = -1
			continue
		}
		seconds = 10*seconds + int64(c-'0')
	}
	return sign * seconds
}()
`

// buildWithClock builds an imps-node whose wall clock goes wrong as clockVariable says. Its
// monotonic clock is right, as that of a machine is whose time is set wrong.
func buildWithClock(t *testing.T) string {
	t.Helper()
	goroot, err := exec.CommandContext(t.Context(), "go", "env", "GOROOT").Output()
	require.NoError(t, err)
	folder, dir := filepath.Join(strings.TrimSpace(string(goroot)), "src", "time"), t.TempDir()
	original, err := os.ReadFile(filepath.Join(folder, "time.go"))
	require.NoError(t, err)
	const reads = "func Now() Time {\n\tsec, nsec, mono := runtimeNow()\n"
	require.Equal(t, 1, strings.Count(string(original), reads), "time.Now is not as this test knows it")
	changed := strings.Replace(string(original), reads, reads+"\tsec += wrong\n", 1)
	replace := map[string]string{}
	for name, text := range map[string]string{"time.go": changed, "wrong.go": wrongClock} {
		file := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
		replace[filepath.Join(folder, name)] = file
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	require.NoError(t, err)
	file := filepath.Join(dir, "overlay.json")
	require.NoError(t, os.WriteFile(file, overlay, 0o600))
	built, err := imps.Build(t.Context(), root, dir, "-overlay="+file)
	require.NoError(t, err)
	return built
}

// All clocks of imps are wrong, each in another way.
func TestWrongClocksDoNoHarm(t *testing.T) {
	wrong := buildWithClock(t)
	clock := func(seconds string) func(*process) {
		return func(p *process) {
			p.binary = wrong
			p.spec.Env = append(p.spec.Env, clockVariable+"="+seconds)
		}
	}
	const ahead, behind = "3600", "-3600"
	s := newSystem(t)
	s.source("hub", "registry.1")
	all := want{namespaces: s.namespaces(2, "a"), registry: "registry.1"}
	all.resource = s.resource("all", "hub", s.byLabel("a")+", "+s.byPods("a"))
	fast := s.coordinator("fast", clock(ahead))
	s.leads(fast)
	slow := s.coordinator("slow", clock(behind))
	s.ready(slow)
	s.agent("node-fast", clock(ahead))
	s.agent("node-slow", clock(behind))
	s.settles(all)
	lease, err := s.core.CoordinationV1().Leases(imps.SystemNamespace).Get(t.Context(), leaseName, metav1.GetOptions{})
	require.NoError(t, err)
	require.Greater(t, time.Until(lease.Spec.RenewTime.Time), 50*time.Minute, "the clock is wrong indeed")

	// works does everything that a clock has to do with.
	works := func(leader, standby *process, registry string) {
		t.Helper()
		require.True(t, s.isLeader(leader))
		require.False(t, s.isLeader(standby), "the two lead at once")
		all.registry = registry
		mark := control.Audit().Mark()
		s.source("hub", registry)
		s.settles(all)
		require.Equal(t, rotation(all), s.writes(mark))

		mark = control.Audit().Mark()
		withPods, served := all, map[string]int{}
		var pods []*corev1.Pod
		for _, node := range []string{"node-fast", "node-slow"} {
			namespace := s.namespace("")
			withPods.namespaces = append(withPods.namespaces, namespace)
			served[target(namespace)] = 1
			pods = append(pods, s.pod(namespace, node, "a"))
		}
		s.settles(withPods)
		require.Equal(t, served, s.writes(mark))
		mark = control.Audit().Mark()
		ended := time.Now()
		for _, pod := range pods {
			s.deletePod(pod)
		}
		s.settles(all)
		require.Equal(t, served, s.writes(mark), "each deleted once")
		require.Greater(t, time.Since(ended), linger)
		require.False(t, s.isLeader(standby), "the two lead at once")
	}
	works(fast, slow, "registry.2")

	// The report of a Node that is gone stays for ten minutes, not for an hour less.
	require.NoError(t, s.core.CoreV1().Nodes().Delete(t.Context(), "node-fast", metav1.DeleteOptions{}))
	s.settles(all)
	_, _, err = s.report("node-fast")
	require.NoError(t, err)
	require.NoError(t, control.Node(t.Context(), "node-fast"))
	s.settles(all)

	fast.Kill()
	s.eventually(func() error { // not before the Lease runs out, and not an hour later
		if !s.isLeader(slow) {
			return errors.New("it does not lead")
		}
		return nil
	}, "the slow one does not take over")
	s.again(fast)
	s.ready(fast)
	works(slow, fast, "registry.3")
}
