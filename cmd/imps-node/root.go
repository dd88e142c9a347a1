package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

func newRootCommand(getenv func(string) string) *cobra.Command {
	root := &cobra.Command{
		Use:   "imps-node",
		Short: "Pull Secrets for every selected namespace",
		Long: `imps-node brings registry credentials to the Pods of a cluster: it turns ImagePullSecret resources
into pull Secrets in the namespaces that they select, before the first pull.

Exit codes:
  0  all went well; "run" or "refresh" was asked to stop by SIGTERM or SIGINT, "plan" found no conflict
  1  an error: a bad flag, an API server that refuses, a duty that cannot go on
  2  "plan" found conflicts`,
		Args:          noArguments,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetFlagErrorFunc(usageError)
	root.AddCommand(newRunCommand(getenv), newPlanCommand(getenv), newExplainCommand(getenv), newRefreshCommand(getenv), newUninstallCommand(getenv), newVersionCommand())
	return root
}

// usageError adds where help is to be found.
func usageError(cmd *cobra.Command, err error) error {
	return fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())
}

// checked returns what a command does: its flags are completed from the environment and validated, and then it runs.
func checked(getenv func(string) string, validate func() error, run func(*cobra.Command) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		if err := applyEnvironment(cmd.Flags(), getenv); err != nil {
			return usageError(cmd, err)
		}
		if err := validate(); err != nil {
			return usageError(cmd, err)
		}
		return run(cmd)
	}
}

func noArguments(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		return nil
	case cmd.HasAvailableSubCommands():
		return usageError(cmd, fmt.Errorf("unknown command %q", args[0]))
	default:
		return usageError(cmd, fmt.Errorf("%s takes no arguments, and %q is one", cmd.CommandPath(), args[0]))
	}
}

// completeValues has a shell complete a flag with these values.
func completeValues(cmd *cobra.Command, flag string, values ...string) {
	// It fails only for a flag that is not there, or twice, and tests complete each of them.
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}

// oneOf returns an error where a flag has none of the values.
func oneOf(flag, value string, values ...string) error {
	if slices.Contains(values, value) {
		return nil
	}
	return fmt.Errorf("--%s: %q is not known: use %s", flag, value, strings.Join(values, ", "))
}
