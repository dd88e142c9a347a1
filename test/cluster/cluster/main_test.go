package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// childEnv has the test binary run a cluster until it is killed, in place of
// the tests; with a node where it is "node".
const childEnv = "IMPS_CLUSTER_TEST_CHILD"

// childNode is the name of that node.
const childNode = "node-of-a-child"

// shared is the cluster of all tests that need no other; they do not run in
// parallel, since some of them stop its components.
var shared *Cluster

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(runChild(os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(runTests(m, os.Stderr))
}

func runTests(m *testing.M, stderr io.Writer) int {
	var err error
	if shared, err = Run(context.Background()); err != nil {
		_, _ = fmt.Fprintln(stderr, err)
		return 1
	}
	code := m.Run()
	if err := errors.Join(shared.Stop(), goleak.Find()); err != nil {
		_, _ = fmt.Fprintln(stderr, err)
		return 1
	}
	return code
}

// runChild starts a cluster, prints its folder, and waits for the end of its
// input, which does not come.
func runChild(stdin io.Reader, stdout, stderr io.Writer) int {
	c, err := Run(context.Background())
	if err == nil && os.Getenv(childEnv) == "node" {
		_, err = c.StartNode(context.Background(), NodeConfig{Name: childNode})
	}
	if err == nil {
		_, _ = fmt.Fprintln(stdout, c.Dir())
		_, err = io.Copy(io.Discard, stdin)
	}
	_, _ = fmt.Fprintln(stderr, err)
	return 1
}

func pid(p *process) int {
	return p.latest().cmd.Process.Pid
}
