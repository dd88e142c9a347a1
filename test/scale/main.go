// Command scale runs a thousand agents against a real API server, with the real coordinator,
// and counts what that costs: `make scale`. docs/scale.md has what it measured.
//
// An agent is the node duty itself, with a connection and a token of its own, bound to a Pod on
// a Node of its own; only the process is shared. Progress goes to the standard error, the result
// to the standard output. Everything is gone when it ends, also after Ctrl-C.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	// As `make build` builds.
	_ = os.Setenv("CGO_ENABLED", "0")
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c := config{root: ".", quiet: 5 * time.Second}
	flags := flag.NewFlagSet("scale", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&c.Agents, "agents", 1000, "`number` of nodes, each with an agent")
	flags.IntVar(&c.Namespaces, "namespaces", 500, "`number` of namespaces; half is selected by label, half by Pods")
	flags.IntVar(&c.Pods, "pods", 10, "`number` of Pods of each node, each in another namespace")
	flags.IntVar(&c.Waiting, "waiting", 2, "`number` of these that wait for an image")
	flags.IntVar(&c.Resources, "resources", 1, "`number` of ImagePullSecrets; each selects all the namespaces")
	flags.IntVar(&c.Reports, "reports", 0, "`number` of further nodes, that have a report but no agent")
	flags.IntVar(&c.NewPods, "new-pods", 100, "`number` of nodes that get a new Pod")
	flags.IntVar(&c.Restarts, "restarts", 10, "`number` of times that the coordinator is killed and started again")
	flags.IntVar(&c.Batch, "batch", 0, "`number` of agents that restart at once; 0: a tenth")
	flags.DurationVar(&c.Idle, "idle", time.Minute, "`time` in which nothing happens")
	markdown := flags.Bool("markdown", true, "print tables")
	asJSON := flags.Bool("json", false, "print JSON")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if c.Batch == 0 {
		c.Batch = max(c.Agents/10, 1)
	}
	if err := c.validate(); err != nil {
		_, _ = fmt.Fprintf(stderr, "scale: %v\n", err)
		return 2
	}

	result, err := simulate(ctx, c, stderr)
	if *asJSON {
		encoder := json.NewEncoder(stdout)
		encoder.SetIndent("", "  ")
		err = errors.Join(err, encoder.Encode(result))
	}
	if *markdown {
		err = errors.Join(err, result.markdown(stdout))
	}
	for _, fault := range result.Faults {
		err = errors.Join(err, errors.New("not as it must be: "+fault))
	}
	if err != nil {
		_, _ = fmt.Fprintf(stderr, "scale: %v\n", err)
		return 1
	}
	return 0
}
