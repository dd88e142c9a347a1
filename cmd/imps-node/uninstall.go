package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/imps-node/imps/pkg/sync/cluster"
)

// uninstallFlags are the flags of uninstall.
type uninstallFlags struct {
	kubeconfig string
	namespace  string
	dryRun     bool
	output     string
}

func newUninstallCommand(getenv func(string) string) *cobra.Command {
	f := &uninstallFlags{}
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take out of ServiceAccounts what imps has put there",
		Long: `uninstall takes out of the imagePullSecrets of all ServiceAccounts what imps has put there, and the
annotation that tells of it. All other entries stay as they are. It is to be run once no coordinator runs
any more, which would put everything in again; while one does, it refuses.

It works with your own rights: list ServiceAccounts in all namespaces, get and patch them, and get the
Lease of the coordinators.`,
		Example: `  kubectl --namespace imps-system scale deployment imps-coordinator --replicas=0
  imps-node uninstall --dry-run
  imps-node uninstall`,
		Args: noArguments,
		RunE: checked(getenv, f.validate, f.run),
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&f.kubeconfig, "kubeconfig", "", "`file` that says how to reach the API server; empty: as kubectl does")
	flags.StringVar(&f.namespace, "namespace", "imps-system", "`namespace` that imps runs in")
	flags.BoolVar(&f.dryRun, "dry-run", false, "change nothing; the API server says whether it would")
	bindEnvironment(flags)
	flags.StringVarP(&f.output, "output", "o", outputTable, "`format`: table or json, a line for each ServiceAccount")
	completeValues(cmd, "output", outputTable, outputJSON)
	return cmd
}

func (f *uninstallFlags) validate() error {
	var err error
	if f.namespace == "" {
		err = errors.New("--namespace: give the namespace that imps runs in")
	}
	return errors.Join(err, oneOf("output", f.output, outputTable, outputJSON))
}

func (f *uninstallFlags) run(cmd *cobra.Command) error {
	client, err := personClient(f.kubeconfig, planQPS, "uninstall")
	if err != nil {
		return err
	}
	out := cmd.OutOrStdout()
	encoder := json.NewEncoder(out)
	verb, done := "took out", 0
	if f.dryRun {
		verb = "would take out"
	}
	err = cluster.Uninstall(cmd.Context(), cluster.UninstallConfig{
		Namespace: f.namespace, DryRun: f.dryRun, Client: client,
		Note: func(note string) { _, _ = fmt.Fprintln(cmd.ErrOrStderr(), "imps-node: note:", note) },
		Done: func(d cluster.Detached) {
			done++
			switch {
			case f.output == outputJSON:
				_ = encoder.Encode(d) // a broken pipe ends the process
			case d.Error != "":
				_, _ = fmt.Fprintf(out, "%s/%s: %s\n", d.Namespace, d.ServiceAccount, d.Error)
			default:
				_, _ = fmt.Fprintf(out, "%s/%s: %s %s\n", d.Namespace, d.ServiceAccount, verb, strings.Join(d.Secrets, ", "))
			}
		},
	})
	if err != nil {
		return err
	}
	if done == 0 && f.output == outputTable {
		_, _ = fmt.Fprintln(out, "no ServiceAccount names a Secret of imps")
	}
	return nil
}
